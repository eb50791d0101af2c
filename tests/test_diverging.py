"""A training whose loss or weights are no longer finite stops, says where, and keeps its last good checkpoint."""

from __future__ import annotations

import pytest
import torch
from small_training import plain, trained
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd import data, distill
from edgekd.data import Dataset
from edgekd.errors import StageError
from edgekd.methods import Method, Setting, Step

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits", {}, train_limit=200, test_limit=60)


@pytest.mark.parametrize("when", ["first", "later"])
def test_a_loss_that_is_not_finite(when, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)

    class Diverging(Method):
        needs_teacher = False

        def forward(self, step: Step) -> dict[str, Tensor]:
            ce = F.cross_entropy(step.student_logits, step.y)
            return {"ce": ce, "extra": ce * float("nan") if when == "first" or step.progress >= 0.5 else ce}

    network = plain()
    with pytest.raises(StageError) as caught:
        trained(network, digits, tmp_path, Diverging())
    step, epoch = (1, 1) if when == "first" else (6, 2)
    stays = (
        f"the last good checkpoint stays in {tmp_path}" if when == "later" else "no checkpoint was written before it"
    )
    assert str(caught.value) == (
        f"error: the loss is not finite at step {step} of 10 (epoch {epoch}): loss is nan, loss_extra is nan\n"
        f"       {stays}\n"
        "fix:   lower train.lr, set train.clip=1, or look for extreme values in the data"
    )
    assert caught.value.exit_code == 4
    file = tmp_path / distill.CHECKPOINT
    assert file.exists() == (when == "later")
    if file.exists():
        state = distill.read_checkpoint(file)
        assert state["epoch"] == 1
        assert all(value.isfinite().all() for value in state["network"].values())


def test_weights_that_are_not_finite_are_never_saved(digits, tmp_path, monkeypatch):
    """The last step's gradient ruins the weights; its loss was still finite, but what is validated is not."""
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(StageError, match=r"not finite by step 5 of 5 \(epoch 1\): val_loss is nan"):
        trained(Exploding(), digits, tmp_path, epochs=1, lr=1.0)
    assert not (tmp_path / distill.CHECKPOINT).exists()


def test_what_a_method_owns_is_saved_only_while_it_is_finite(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "CHECKPOINT_SECONDS", 0.0)

    class Steep(torch.autograd.Function):
        """0, with a slope of infinity."""

        @staticmethod
        def forward(context, x: Tensor) -> Tensor:
            return x * 0

        @staticmethod
        def backward(context, gradient: Tensor) -> Tensor:
            return gradient * float("inf")

    class Ruined(Method):
        needs_teacher = False

        def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, step: Step) -> dict[str, Tensor]:
            own = Steep.apply(self.scale) if step.progress >= 0.9 else self.scale * 0
            return {"ce": F.cross_entropy(step.student_logits, step.y), "own": own}

    method = Ruined()
    trained(plain(), digits, tmp_path, method)
    assert not method.scale.isfinite()
    assert distill.read_checkpoint(tmp_path / distill.CHECKPOINT)["epoch"] == 1


class Exploding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        logits: Tensor = self.fc(x.flatten(1))
        if self.training and self.calls == 5:
            logits.register_hook(lambda grad: grad * float("inf"))
        return logits

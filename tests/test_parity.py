"""A wrong graph is found out, a right one is not accused, and neither is a network that jumps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekd.errors import ExportError
from edgekd.parity import Parity, parity
from edgekd.tasks.classification import Classification

N, K = 300, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(0, 1, (N, 1, 4, 4)).astype(np.float32)


class Smooth(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, K)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.fc(x.flatten(1)))


class Jumping(Smooth):
    """Adds 0.3 to the first logit where the first pixel is above 0.5."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + 0.3 * torch.eye(K)[0] * (x[:, 0, 0, :1] > 0.5)


def logits(network: nn.Module, images=IMAGES) -> np.ndarray:
    with torch.no_grad():
        return network(torch.from_numpy(images)).numpy()


def compared(network: nn.Module, got: np.ndarray, images=IMAGES, tolerance: float = 1e-3) -> Parity:
    return parity(network, lambda index: images[index], logits(network, images), got, tolerance, Classification())


def test_rounding_passes_and_is_measured():
    network = Smooth()
    got = logits(network)
    got[17, 2] += 5e-4
    found = compared(network, got)
    found.check("student.onnx")
    assert (found.samples, found.at_jumps, found.unexplained, found.worst_sample) == (N, 0, 0, 17)
    assert found.max_abs_error == pytest.approx(5e-4, rel=1e-3)
    assert found.agreement == 1.0
    assert found.as_dict()["tolerance"] == 1e-3


def test_the_tolerance_grows_with_the_logits_but_never_shrinks():
    for scale, allowed in ((1e-3, 1e-3), (1.0, 1e-3), (1000.0, 0.5)):
        network = Smooth(scale)
        largest = np.abs(logits(network)[5]).max()
        limit = 1e-3 * max(1, largest)
        assert limit >= allowed
        for factor, unexplained in ((0.98, 0), (1.05, 1)):
            got = logits(network)
            got[5, 0] += factor * limit
            assert compared(network, got).unexplained == unexplained


@pytest.mark.parametrize("network", [Smooth(), Jumping()])
def test_one_wrong_sample_of_many_is_found(network):
    got = logits(network)
    got[123] = got[123][::-1] * 1.1
    got[7, 0] += 5e-4
    found = compared(network, got)
    assert (found.unexplained, found.worst_sample) == (1, 123)
    with pytest.raises(ExportError) as caught:
        found.check("student.onnx")
    expected = logits(network)[123]
    error = np.abs(got[123] - expected).max()
    assert str(caught.value) == (
        f"error: student.onnx differs from torch by {error:.3g} at test sample 123"
        f" (agreement {found.agreement:.2%} of 300)\n"
        f"       tolerance 0.001 of the largest logit; torch [{' '.join(f'{v:.4g}' for v in expected)}],"
        f" ONNX [{' '.join(f'{v:.4g}' for v in got[123])}]\n"
        "fix:   try another export.form or export.opset; or raise export.tolerance, if this agreement will do"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_a_number_fails(value):
    got = logits(Smooth())
    got[3, 1] = value
    found = compared(Smooth(), got)
    assert (found.unexplained, found.worst_sample) == (1, 3)
    with pytest.raises(ExportError, match="at test sample 3"):
        found.check("student.onnx")


def test_samples_within_rounding_of_a_jump_are_explained():
    """Those whose first pixel is next to 0.5 land on the other side; torch does so too, when it is nudged."""
    network, images = Jumping(), IMAGES.copy()
    at = [4, 50, 200]
    images[at, 0, 0, 0] = np.float32(0.5) + np.float32([1e-7, -1e-7, 3e-7])
    got = logits(network, images)
    side = np.where(images[at, 0, 0, 0] > 0.5, -0.3, 0.3)
    got[at, 0] += side
    found = compared(network, got, images)
    found.check("student.onnx")
    assert (found.at_jumps, found.unexplained) == (3, 0)
    assert found.max_abs_error == pytest.approx(0.3, rel=1e-3)


def test_a_jump_in_the_wrong_place_is_not_explained():
    network, images = Jumping(), IMAGES.copy()
    images[9, 0, 0, 0] = 0.502  # a cut rounded to three digits, say
    got = logits(network, images)
    got[9, 0] -= 0.3
    found = compared(network, got, images)
    assert (found.at_jumps, found.unexplained, found.worst_sample) == (0, 1, 9)


def test_a_jump_of_the_wrong_size_is_not_explained():
    network, images = Jumping(), IMAGES.copy()
    images[9, 0, 0, 0] = np.float32(0.5) + np.float32(1e-7)
    got = logits(network, images)
    got[9, 0] -= 0.9
    assert compared(network, got, images).unexplained == 1


def test_a_graph_that_is_wrong_everywhere_is_found_at_once():
    calls = []

    class Counting(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    network = Counting()
    expected = logits(network)
    calls.clear()
    found = parity(network, lambda index: IMAGES[index], expected, expected + 1, 1e-3, Classification())
    assert found.unexplained == 100  # of the worst hundred; it looks no farther
    assert sum(calls) == 1700


def test_logits_that_are_not_those_of_the_network_are_found():
    """What torch is said to have computed is not what it computes: no nudge explains that."""
    expected = logits(Jumping())
    expected[31, 2] += 0.5
    found = parity(Jumping(), lambda index: IMAGES[index], expected, logits(Jumping()), 1e-3, Classification())
    assert (found.unexplained, found.worst_sample) == (1, 31)


def test_other_shapes():
    with pytest.raises(ExportError) as caught:
        compared(Smooth(), logits(Smooth())[:, :3])
    assert str(caught.value) == (
        "error: the graph returns logits [300, 3], torch [300, 4]\n"
        "       expected: the same shape\n"
        "fix:   make the network's forward treat every image of a batch alike"
    )

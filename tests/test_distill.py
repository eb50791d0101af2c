"""The training loop: every option of `Train` does what it says, and what is wrong is said."""

from __future__ import annotations

import copy
import json
import shutil

import numpy as np
import pytest
import torch
from small_training import plain, trained
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd import data, distill, networks, registry
from edgekd.data import Dataset, Split
from edgekd.data.batches import Batches, evaluation_batches
from edgekd.distill import Progress
from edgekd.errors import StageError
from edgekd.methods import Method, Setting, Step
from edgekd.recipe import Augment
from edgekd.training_log import METRICS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits", {}, train_limit=200, test_limit=60)


def residual(activation: str = "relu", seed: int = 0) -> nn.Module:
    return networks.build("resnet", {"depth": 8, "width": 0.25}, data.Shape(1, 8, 8), 10, (activation, {}), seed)


class Spy(Method):
    """Cross-entropy that writes down what the loop gives it."""

    needs_teacher = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[float, tuple[int, ...], bool]] = []

    def forward(self, step: Step) -> dict[str, Tensor]:
        self.seen.append((step.progress, tuple(step.x.shape), step.x.is_contiguous(memory_format=torch.channels_last)))
        return {"ce": F.cross_entropy(step.student_logits, step.y)}


def by_hand(
    network: nn.Module, dataset: Dataset, make_optimizer, epochs: int = 2, clip: float | None = None
) -> nn.Module:
    """The same training without edgekd's loop: constant learning rate, batches of 32."""
    batches = Batches(dataset.train, dataset, batch_size=32, augment=Augment(), seed=0, device="cpu")
    optimizer = make_optimizer(network.parameters())
    for epoch in range(epochs):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(batch.x), batch.y).backward()
            if clip:
                nn.utils.clip_grad_norm_(network.parameters(), clip)
            optimizer.step()
    return network


def assert_close(network: nn.Module, other: nn.Module, tolerance: float = 1e-5) -> None:
    for (name, value), expected in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=tolerance, atol=tolerance, msg=name)


OPTIMIZERS = {
    "sgd": (
        {"momentum": 0.8, "weight_decay": 0.01},
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.01),
    ),
    "sgd-plain": ({"momentum": 0.0, "weight_decay": 0.0}, lambda p: torch.optim.SGD(p, lr=0.05)),
    "sgd-heavy-ball": ({"nesterov": False, "weight_decay": 0}, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "adamw": ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1)),
    "clip": ({"momentum": 0, "weight_decay": 0, "clip": 0.5}, lambda p: torch.optim.SGD(p, lr=0.05)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_a_loop_written_by_hand(name, digits, tmp_path):
    given, make_optimizer = OPTIMIZERS[name]
    network, start = plain(), plain()
    trained(network, digits, tmp_path, schedule="constant", keep="last", **given)
    assert_close(network, by_hand(plain(), digits, make_optimizer, clip=given.get("clip")), 2e-5)
    assert not torch.equal(network[0].weight, start[0].weight)


class Adversary(Spy):
    """Has a parameter of its own, with an optimiser of its own and a gradient far above the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD([self.scale], lr=0.5)]

    def forward(self, step: Step) -> dict[str, Tensor]:
        return super().forward(step) | {"adversary": 1000 * self.scale}


def test_the_gradient_of_an_adversary_does_not_shrink_the_students_steps(digits, tmp_path):
    given, make_optimizer = OPTIMIZERS["clip"]
    network, method = plain(), Adversary()
    trained(network, digits, tmp_path, method, schedule="constant", keep="last", **given)
    assert_close(network, by_hand(plain(), digits, make_optimizer, clip=given["clip"]), 2e-5)
    assert method.scale.item() == pytest.approx(1 - 0.5 * 0.5 * 2 * 5, rel=1e-4)  # ten steps, clipped to 0.5


def test_accumulated_batches_are_one_bigger_batch(digits, tmp_path):
    many, few = plain(), plain()
    # 180 samples: 22 batches of 8, of which 4 make a step and the last 2 one of their own; or 5 of 32 and one of 16.
    batches = Batches(digits.train, digits, batch_size=8, augment=Augment(), seed=0, device="cpu")
    trained(many, digits, tmp_path, batch_size=8, accumulate=4, schedule="constant", keep="last", epochs=1)
    optimizer = torch.optim.SGD(few.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    index = [batch.index for batch in batches.epoch(0)]
    assert len(index) == 22
    for at in range(0, 22, 4):
        rows = torch.cat(index[at : at + 4]).numpy()
        x, y = digits.normalize(digits.train.images[rows]), digits.train.labels[rows]
        optimizer.zero_grad()
        F.cross_entropy(few(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
    assert_close(many, few)


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_the_learning_rate_of_an_epoch_is_in_its_metrics(schedule, digits, tmp_path):
    found = trained(plain(), digits, tmp_path, schedule=schedule, epochs=4, lr=0.08, milestones=[0.5], gamma=0.25)
    last = np.arange(1, 5) * 5 - 1  # updates are counted from 0, 5 an epoch
    expected = 0.04 * (1 + np.cos(np.pi * last / 20)) if schedule == "cosine" else [0.08, 0.08, 0.02, 0.02]
    np.testing.assert_allclose([epoch["lr"] for epoch in found.epochs], expected, rtol=1e-12)


def test_plateau_lowers_the_learning_rate_when_validation_stands_still(digits, tmp_path):
    found = trained(plain(), digits, tmp_path, schedule="plateau", patience=1, gamma=0.5, epochs=6, lr=1e-9)
    assert [epoch["lr"] for epoch in found.epochs] == pytest.approx(np.array([1, 1, 1, 0.5, 0.5, 0.25]) * 1e-9)


def test_ema_keeps_the_moving_average(digits, tmp_path):
    averaged, network = plain(), plain()
    trained(averaged, digits, tmp_path, schedule="constant", keep="last", epochs=1, ema=0.7, momentum=0, weight_decay=0)
    optimizer, average = torch.optim.SGD(network.parameters(), lr=0.05), None
    for batch in Batches(digits.train, digits, batch_size=32, augment=Augment(), seed=0, device="cpu").epoch(0):
        optimizer.zero_grad()
        F.cross_entropy(network(batch.x), batch.y).backward()
        optimizer.step()
        now = [value.detach().clone() for value in network.parameters()]
        average = now if average is None else [0.7 * a + 0.3 * b for a, b in zip(average, now, strict=True)]
    for value, expected in zip(averaged.parameters(), average, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


def test_keep_best_and_keep_last(digits, tmp_path):
    """The first two epochs learn the digits, the last two learn wrong ones."""
    best, last = plain(), plain()
    options = {"epochs": 4, "schedule": "constant", "optimizer": "adamw", "lr": 0.02, "batch_size": 8}

    class Ruin(Method):
        needs_teacher = False

        def forward(self, step: Step) -> dict[str, Tensor]:
            return {"ce": F.cross_entropy(step.student_logits, step.y if step.progress < 0.5 else (step.y + 1) % 10)}

    kept = trained(best, digits, tmp_path / "best", Ruin(), **options)
    newest = trained(last, digits, tmp_path / "last", Ruin(), keep="last", **options)
    accuracy = [epoch["val_score"] for epoch in kept.epochs]
    assert (kept.kept, newest.kept) == (2, 4)
    assert accuracy[1] >= accuracy[0] > max(accuracy[2:])
    assert [epoch["val_score"] for epoch in newest.epochs] == accuracy
    for network, expected in ((best, accuracy[1]), (last, accuracy[3])):
        assert not network.training
        logits = distill.predict(network, digits.val, digits)
        assert (logits.argmax(1) == digits.val.labels).mean() == expected


def test_bf16_is_autocast_and_the_weights_stay_float32(digits, tmp_path):
    seen = []

    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.dtype)
            return x

    network = nn.Sequential(plain()[0], Watch(), nn.Flatten(), nn.Linear(96, 10))
    found = trained(network, digits, tmp_path, precision="bf16", epochs=1)
    assert torch.bfloat16 in seen
    assert {value.dtype for value in network.parameters()} == {torch.float32}
    seen.clear()
    trained(network, digits, tmp_path / "again", epochs=1)  # precision is chosen anew for every training
    distill.predict(network, digits.val, digits)
    assert set(seen) == {torch.float32}
    assert np.isfinite(found.epochs[0]["train_loss"])


def test_under_bf16_a_method_computes_in_float32(digits, tmp_path):
    seen = []

    class Watch(Method):
        def forward(self, step: Step) -> dict[str, Tensor]:
            student, teacher = step.student_logits, step.teacher_logits
            seen.append((student @ teacher.T).dtype)
            for logits in (student, teacher):  # the networks themselves are rounded
                assert torch.equal(logits, logits.bfloat16().float())
            return {"ce": F.cross_entropy(student, step.y)}

    trained(plain(), digits, tmp_path, Watch(), teacher=plain(1), precision="bf16", epochs=1, augment={"crop": 1})
    assert set(seen) == {torch.float32}


def test_channels_last_trains_the_same_network(digits, tmp_path):
    one, other, spy = residual(), residual(), Spy()
    trained(one, digits, tmp_path / "1", spy, channels_last=True, epochs=1)
    trained(other, digits, tmp_path / "2", epochs=1)
    assert all(last for *_, last in spy.seen)
    assert one.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(one, other, 1e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about torch
def test_compile_trains_the_same_network(digits, tmp_path):
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none here")
    one, other = plain(), plain()
    trained(one, digits, tmp_path / "1", compile=True, epochs=1)
    trained(other, digits, tmp_path / "2", epochs=1)
    assert_close(one, other, 1e-4)
    assert set(one.state_dict()) == set(other.state_dict())


def test_progress_and_metrics(digits, tmp_path):
    spy, told = Spy(), []
    found = trained(plain(), digits, tmp_path, spy, on_progress=told.append)
    assert [progress.done for progress in told] == list(range(1, 11))
    assert {progress.total for progress in told} == {10}
    assert told[0] == Progress(1, 10, {})
    assert told[-1].metrics == found.epochs[0]
    assert [progress for progress, *_ in spy.seen] == pytest.approx([number / 10 for number in range(10)])
    names = ["epoch", "train_loss", "train_score", "train_loss_ce", "val_score", "val_loss", "lr", "seconds"]
    assert [list(epoch) for epoch in found.epochs] == [names, names]
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.epochs
    assert found.epochs[1]["train_loss"] == found.epochs[1]["train_loss_ce"] < found.epochs[0]["train_loss"]


def test_metrics_are_means_over_the_epoch(digits, tmp_path):
    network = plain()
    found = trained(network, digits, tmp_path, lr=1e-30, epochs=1, weight_decay=0)
    batches = list(Batches(digits.train, digits, batch_size=32, augment=Augment(), seed=0, device="cpu").epoch(0))
    with torch.no_grad():
        losses = [float(F.cross_entropy(network(batch.x), batch.y)) for batch in batches]
        right = [float((network(batch.x).argmax(1) == batch.y).float().mean()) for batch in batches]
    logits = torch.from_numpy(distill.predict(network, digits.val, digits))
    labels = torch.from_numpy(digits.val.labels)
    assert found.epochs[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.epochs[0]["train_score"] == pytest.approx(np.mean(right), rel=1e-5)
    assert found.epochs[0]["val_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-5)
    assert found.epochs[0]["val_score"] == float((logits.argmax(1) == labels).double().mean())


def test_an_option_that_changes_is_in_the_log(digits, tmp_path):
    method = registry.create("method", "kd", options={"temperature": {"linear": [5.0, 1.0]}})
    found = trained(plain(), digits, tmp_path, method, teacher=plain(1))
    taken = 5 - 4 * np.arange(10) / 10  # five batches an epoch; the log has their mean
    assert [epoch["train_temperature"] for epoch in found.epochs] == pytest.approx([taken[:5].mean(), taken[5:].mean()])


def test_tensorboard_reads_what_is_written(digits, tmp_path):
    found = trained(plain(), digits, tmp_path, tensorboard=True)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(found.epochs[0])
    for name in ("val_score", "train_loss"):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(e["epoch"], pytest.approx(e[name], rel=1e-6)) for e in found.epochs]


def test_the_teacher_stays_as_it_is(digits, tmp_path):
    teacher, modes = residual("lma", seed=5), []
    teacher.register_forward_hook(lambda module, *_: modes.append(module.training))
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = plain()
    trained(student, digits, tmp_path, teacher=teacher, augment={"crop": 1})
    assert len(modes) == 10
    assert not any(modes)
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in teacher.parameters())
    alone = plain()
    trained(alone, digits, tmp_path / "alone", augment={"crop": 1})
    assert not torch.equal(alone[0].weight, student[0].weight)


def test_a_method_trains_what_it_owns(digits, tmp_path):
    class Projected(Method):
        needs_teacher = False

        def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
            self.projector = nn.Linear(10, 10)

        def forward(self, step: Step) -> dict[str, Tensor]:
            return {"ce": F.cross_entropy(self.projector(step.student_logits), step.y)}

    methods = [Projected(), Projected()]
    for number, method in enumerate(methods):
        torch.manual_seed(100 + number)  # what it makes depends on the recipe's seed alone
        trained(plain(), digits, tmp_path / str(number), method, epochs=1)
    assert torch.equal(methods[0].projector.weight, methods[1].projector.weight)
    fresh = Projected()
    distill._seed_random(torch.device("cpu"), "method", 0)
    images, mean, std = torch.zeros(2, 1, 8, 8), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    setting = Setting(images, torch.zeros(1), 10, mean, std, 1, lambda n: images[:n])
    fresh.attach(plain(), None, setting)
    assert not torch.equal(fresh.projector.weight, methods[0].projector.weight)
    saved = distill.read_checkpoint(tmp_path / "0" / distill.CHECKPOINT)["method"]
    assert torch.equal(saved["projector.weight"], methods[0].projector.weight)


def test_the_seed_decides(digits, tmp_path):
    def run(seed: int, name: str) -> Tensor:
        network = networks.build("lma_student", {"width": 0.2}, digits.shape, 10, ("relu", {}), 0)
        trained(network, digits, tmp_path / name, epochs=1, seed=seed)
        return torch.cat([value.flatten() for value in network.parameters()])

    assert torch.equal(run(1, "a"), run(1, "b"))
    assert not torch.equal(run(1, "c"), run(2, "d"))


def test_batch_normalisation_needs_two_samples(digits, tmp_path):
    with pytest.raises(StageError) as caught:
        trained(residual(), digits, tmp_path, batch_size=1)
    assert str(caught.value) == (
        "error: the network has batch normalisation, which learns nothing from a batch of one sample\n"
        "       expected: at least 2 samples a step and process\n"
        "fix:   raise train.batch_size, or give more training samples"
    )
    trained(plain(), digits, tmp_path / "plain", batch_size=1, epochs=1)


@pytest.mark.parametrize("augment", [{}, {"crop": 1, "flip": True}], ids=["same", "changing"])
def test_cached_teacher_logits_are_the_teachers(augment, digits, tmp_path):
    teacher, calls = residual(seed=7), []
    teacher.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    students = [plain() for _ in range(3)]
    trained(students[0], digits, tmp_path / "0", teacher=teacher, augment=augment)
    first = sum(calls)
    for number in (1, 2):
        calls.clear()
        trained(
            students[number],
            digits,
            tmp_path / str(number),
            teacher=teacher,
            augment=augment,
            logits_cache=tmp_path / "cache",
        )
        # Everything once for the first of them; the second asks the teacher nothing.
        assert sum(calls) == ((2 if augment else 1) * len(digits.train) if number == 1 else 0)
    assert first == (320 if augment else len(digits.train))  # without augmentation its answers are kept in memory
    assert_close(students[1], students[0], 1e-5)
    assert all(torch.equal(a, b) for a, b in zip(students[1].parameters(), students[2].parameters(), strict=True))
    assert len(list((tmp_path / "cache").iterdir())) == (2 if augment else 1)


@pytest.mark.parametrize("damage", ["cut", "shape", "gone"])
def test_a_damaged_cache_is_made_anew(damage, digits, tmp_path):
    teacher = residual(seed=7)
    students = [plain() for _ in range(2)]
    for number, student in enumerate(students):
        trained(student, digits, tmp_path / str(number), teacher=teacher, logits_cache=tmp_path / "cache")
        (file,) = (tmp_path / "cache").iterdir()
        whole = np.load(file)
        assert whole.shape == (len(digits.train), 10)
        if damage == "cut":
            file.write_bytes(file.read_bytes()[:-100])
        elif damage == "shape":
            np.save(file, whole[:-1])
        else:
            file.unlink()
    assert all(torch.equal(a, b) for a, b in zip(students[0].parameters(), students[1].parameters(), strict=True))


def test_predict(digits):
    network = residual()
    network.train()
    network.stages[0].eval()
    before = copy.deepcopy(network.state_dict())
    logits = distill.predict(network, digits.test, digits)
    assert logits.dtype == np.float32
    assert logits.shape == (60, 10)
    assert network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])
    network.eval()
    with torch.no_grad():
        expected = network(torch.from_numpy(digits.normalized("test"))).numpy()
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(("size", "batch"), [(8, 500), (32, 500), (224, 53), (2000, 1)])
def test_evaluation_keeps_within_memory(size, batch, digits):
    images = np.zeros((1, 3, size, size), np.uint8)
    large = Dataset("large", *[Split(images, np.zeros(1, np.int64))] * 3, digits.class_names, (0.5,) * 3, (0.5,) * 3)
    assert distill.evaluation_batch(large) == batch
    assert next(evaluation_batches(large.val, large, batch_size=batch, device="cpu")).shape == images.shape

"""The adversarial methods' own checks on the digits: squeezed_adversarial, bss, ard, robust_prune, dfad.

PYTHONPATH=benchmarks python benchmarks/methods/adversarial.py [--studies bss] [--seeds 0 1 2] > FILE
PYTHONPATH=benchmarks python benchmarks/methods/adversarial.py --report FILE [FILE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from comparison import Result, Rows, Study, command, compared, few, made, many, setting, students, teacher
from every_method import IMAGES, TEACHER, TEACHER_BUDGET, accuracy, fit, network
from results import table
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd import distill
from edgekd.data import Dataset, Split
from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import Ball, boundary, evaluating, limits, pgd, withstood
from edgekd.methods.bss import base_samples, similarity
from edgekd.methods.pruning import SingleWeights
from edgekd.methods.squeezed_adversarial import attention
from edgekd.recipe import Train

FIFTH = 288  # of the 1,438 images that are no test images; a tenth of them validates
STEP_SIZES = (0.3, 0.1, 0.03)
DFAD_BUDGET = Train(epochs=25, batch_size=32, lr=0.05, keep="last")
LONG_BUDGET = DFAD_BUDGET.model_copy(update={"epochs": 100})
CONSTANT = "dfad, generator_lr 0.001 throughout"
ROBUST_BUDGET = Train(epochs=15, batch_size=64, lr=0.05, keep="last")
SPARSE_BUDGET = ROBUST_BUDGET.model_copy(update={"epochs": 10})
EPSILON, TRAIN_STEPS = 25.5, 5  # 0.1 of the pixel scale
ATTACK = {"epsilon": EPSILON, "step_size": EPSILON / 4, "steps": TRAIN_STEPS}
SANITY = 128.0
SPARSITY, PRUNED_AT = 0.9, 0.4
SMALL = {"depth": 8, "width": 0.15}


class AdversarialTraining(Method):
    """Cross-entropy on attacked images (Madry et al., ICLR 2018): how the robust teacher, and a baseline, are made."""

    needs_teacher = False

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        self.ball = Ball.of(EPSILON, EPSILON / 4, setting.mean, setting.std)

    def forward(self, step: Step) -> dict[str, Tensor]:
        with evaluating(step.student):
            attacked = pgd(lambda x: F.cross_entropy(step.student(x), step.y), step.x, self.ball, TRAIN_STEPS)
        return {"ce": F.cross_entropy(step.student(attacked), step.y)}


class PrunedFirst(AdversarialTraining):
    """Training as usual; then the smallest weights go, and what is left is trained under attack."""

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        super().attach(student, teacher, setting)
        self.weights = SingleWeights(student)
        self.kept: Tensor | None = None

    def forward(self, step: Step) -> dict[str, Tensor]:
        return super().forward(step) if step.progress >= PRUNED_AT else {"ce": step.label_loss()}

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        if progress >= PRUNED_AT:
            if self.kept is None:
                self.kept = self.weights.strongest(self.weights.strength(student), SPARSITY)
            self.weights.scale(student, self.kept)


def answers(student: nn.Module, dataset: Dataset) -> np.ndarray:
    return distill.predict(student, dataset.test, dataset).argmax(1)


def test_tensors(dataset: Dataset) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Test images and labels; mean and std as attacks take them."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    return torch.from_numpy(dataset.normalized("test")), torch.from_numpy(dataset.test.labels), mean, std


def squeezed(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """The ablation: cross-entropy, with the adversary, with the attentions too; and where attention lies."""
    dataset = few(IMAGES)
    yield {"row": "teacher", "top1": accuracy(teacher(seed), dataset)}
    plain = {"kd_weight": 0.0, "ce_weight": 1.0}
    method = made("squeezed_adversarial")
    rows = {
        "scratch": made("scratch"),
        "kd": made("kd"),
        "labels, adversary": made("squeezed_adversarial", attention_weight=0.0, **plain),
        "labels, adversary, attention": made("squeezed_adversarial", **plain),
        "squeezed_adversarial, attention_weight 1": made("squeezed_adversarial", attention_weight=1.0),
        "squeezed_adversarial": method,
    }
    yield from students(rows, seed, only, dataset)
    x, y, *_ = test_tensors(dataset)
    with torch.no_grad(), method.teacher_taps.recording() as maps:
        right = teacher(seed)(x).argmax(1) == y
    deepest = method.teacher_taps.paths[0]
    seen = attention(maps[deepest], method.teacher_heads[0], y)[right, 0]
    inside = seen[:, 2:-2, 2:-2].sum((1, 2)) / seen.sum((1, 2)).clamp(min=1e-9)
    yield {"row": "central", "share": float(inside.mean()), "uniform": 16 / 64}


def about_squeezed(rows: Rows) -> str:
    share, uniform = (statistics.mean(rows.values("central", key)) for key in ("share", "uniform"))
    return (
        f"{setting(rows, few(IMAGES))} The rows that begin with `labels` are without the divergence of the logits,"
        " which is kd's; its weights are kd's too. The default weight of the attentions was lowered to 0.1 after the"
        f" row with 1.\n\n{compared(rows)} At the teacher's first level {share:.0%} of the attention to images that it"
        f" tells right lies in the central 4x4 pixels, which are {uniform:.0%} of the area."
    )


def bss(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Students of few images; what the attack does to the teacher, and how alike the ways to the boundary are."""
    dataset = few(FIFTH)
    x, y, mean, std = test_tensors(dataset)
    of, (low, high) = teacher(seed), limits(mean, std)
    yield {"row": "teacher", "top1": accuracy(of, dataset)}
    of_teacher = of(x)

    def attacked(network: nn.Module, told: Tensor, step_size: float) -> tuple[Tensor, Tensor]:
        """The attacked images, and which have turned; always to the same classes."""
        torch.manual_seed(seed)
        others = of_teacher[told].scatter(1, y[told][:, None], float("-inf"))
        target = torch.multinomial(others.softmax(1), 1)[:, 0]
        return boundary(network, x[told], y[told], target, low, high, step_size, 10)

    def ways(student: nn.Module, method: Method) -> Result:
        told = base_samples(of_teacher, torch.from_numpy(distill.predict(student, dataset.test, dataset)), y, len(y))
        moved = [attacked(one, told, STEP_SIZES[0])[0] - x[told] for one in (of, student.eval())]
        magsim, angsim = (float(value) for value in similarity(*moved))
        return {"magsim": magsim, "angsim": angsim}

    told = (of_teacher.argmax(1) == y).nonzero()[:, 0]
    for step_size in STEP_SIZES:
        images, turned = attacked(of, told, step_size)
        top = of(images).softmax(1).topk(2, dim=1).values
        gap = float((top[:, 0] - top[:, 1]).median())
        yield {"row": f"step {step_size}", "turned": float(turned.float().mean()), "gap": gap}
    rows = {"scratch": made("scratch"), "kd": made("kd")}
    rows |= {"bss" if size == STEP_SIZES[0] else f"bss, step_size {size}": made("bss", step_size=size)
             for size in STEP_SIZES}  # fmt: skip
    yield from students(rows, seed, only, dataset, about=ways)


def about_bss(rows: Rows) -> str:
    attacks = []
    for size in STEP_SIZES:
        turned, gap = (statistics.mean(rows.values(f"step {size}", key)) for key in ("turned", "gap"))
        attacks.append(f"{turned:.0%} and {gap:.2f} with step_size {size}")
    return (
        f"{setting(rows, few(FIFTH))} The images are a fifth. MagSim and AngSim are those of the ways of teacher and"
        " student to the boundary, on test images that both tell right, with the published step size,"
        f" {STEP_SIZES[0]}.\n\n{compared(rows, MagSim='magsim', AngSim='angsim')} {rows.says('bss', 'kd')}. Of the"
        " attacked test images so many turn within 10 steps (90 % were expected), and this is the median gap of the"
        f" teacher's two largest probabilities there (below 0.2, and 0 at the boundary): {'; '.join(attacks)}."
    )


def dfad(budget: Train, data_too: bool, seed: int, only: Sequence[str]) -> Iterator[Result]:
    """The student without data, against one with the data and one with noise in its place."""
    of, whole = teacher(seed), many()
    yield {"row": "teacher", "top1": accuracy(of, whole)}
    noise = np.random.default_rng(seed).integers(0, 256, whole.train.images.shape, dtype=np.uint8)
    noisy = replace(whole, train=Split(noise, whole.train.labels))

    def agreement(student: nn.Module, method: Method) -> Result:
        return {"agreement": 100 * float((answers(student, whole) == answers(of, whole)).mean())}

    if data_too:
        rows = {"scratch": made("scratch"), "kd": made("kd")}
        yield from students(rows, seed, only, whole, budget=budget, about=agreement)
    on_noise = {"kd on noise": made("kd", kd_weight=1.0, ce_weight=0.0)}
    yield from students(on_noise, seed, only, noisy, budget=budget, about=agreement)
    rows = {"dfad": made("dfad"), CONSTANT: made("dfad", generator_lr=1e-3)}
    yield from students(rows, seed, only, whole, budget=budget, about=agreement)


def about_dfad(budget: Train, data_too: bool, rows: Rows) -> str:
    steps = budget.epochs * (len(many().train) // budget.batch_size)
    shown = [[row, rows.mean(row), rows.mean(row, "agreement") if row in rows.students() else ""] for row in rows.lines]
    said = [rows.says("dfad", base) for base in (["kd"] if data_too else []) + ["kd on noise", CONSTANT]]
    with_data = "`scratch` and `kd` have the training images; " if data_too else ""
    return (
        f"Digits, {len(rows.seeds)} seeds: accuracy in percent of {len(many().test)} test images, mean ± standard"
        " deviation. The teacher is a ResNet-14 of half the width, the student a ResNet-8;"
        f" {steps} steps of the student, a fifth as many of the generator (published for CIFAR: 125,000)."
        f" {with_data}`kd on noise` has noise in their place; `dfad` has none.\n\n"
        f"{table(['', 'accuracy', 'agreement with the teacher'], shown)}\n\n{'; '.join(said)}."
    )


def robust_teacher(seed: int) -> nn.Module:
    trained = network(TEACHER, many(), seed)
    fit(trained, many(), TEACHER_BUDGET, AdversarialTraining(), None, seed)
    return trained.requires_grad_(False)


def attacked(student: nn.Module, seed: int) -> Result:
    """Accuracy in percent, on all test images: clean, under PGD-20, and under an attack that must succeed."""
    x, y, mean, std = test_tensors(many())
    student.requires_grad_(False)
    torch.manual_seed(seed)
    robust, sanity = (
        100 * float(withstood(student, x, y, Ball.of(epsilon, epsilon / 8, mean, std), 20).float().mean())
        for epsilon in (EPSILON, SANITY)
    )
    return {"top1": accuracy(student, many()), "robust": robust, "sanity": sanity}


def ard(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Robust accuracy by what the teacher is and how it teaches."""
    teachers = {"natural": teacher(seed), "robust": robust_teacher(seed)}
    for kind, of in teachers.items():
        yield {"row": f"teacher, {kind}", **attacked(of, seed)}
    robust = {"kl_reduction": "batchmean", "temperature": 4.0, **ATTACK}
    rows: dict[str, tuple[Method, str]] = {
        "scratch": (made("scratch"), "natural"),
        "kd": (made("kd"), "natural"),
        "kd, robust teacher": (made("kd"), "robust"),
        "adversarial training": (AdversarialTraining(), "natural"),
        "ard": (made("ard", **robust), "robust"),
        "ard, replays 4": (made("ard", **robust, replays=4), "robust"),
    }
    for row, (method, kind) in rows.items():
        yield from students(
            {row: method}, seed, only, many(), budget=ROBUST_BUDGET, of=teachers[kind],
            about=lambda student, method: attacked(student, seed),
        )  # fmt: skip


def about_ard(rows: Rows) -> str:
    keys = ("top1", "robust", "sanity")
    shown = [[row, *(rows.mean(row, key) for key in keys)] for row in rows.lines]
    said = [rows.says(row, base, key="robust") for row, base in (
        ("ard", "adversarial training"), ("ard, replays 4", "ard"), ("ard", "kd"), ("kd, robust teacher", "kd")
    )]  # fmt: skip
    return (
        f"{under_attack(rows, ROBUST_BUDGET)} `ard` has temperature 4 and KL summed over the classes here.\n\n"
        f"{table(['', 'as they are', 'PGD-20', 'must fail'], shown)}\n\nUnder PGD-20 {'; '.join(said)}."
    )


def under_attack(rows: Rows, budget: Train) -> str:
    return (
        f"{setting(rows, many(), budget)} Training attacks are PGD-{TRAIN_STEPS} within {EPSILON}/255, the"
        f" robust teacher's too. Under PGD-20 within {EPSILON}/255, and within {SANITY:g}/255, where it must succeed."
    )


def sparse(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Nine tenths of the weights gone, under attack: at once by robust_prune, in turn, and by a small network."""
    of = robust_teacher(seed)
    yield {"row": "teacher, robust", **attacked(of, seed)}
    options = {"prune": "weights", "sparsity": SPARSITY, **ATTACK}

    def found(student: nn.Module, method: Method) -> Result:
        weights = SingleWeights(student).strength(student)
        held = sum(buffer.numel() for name, buffer in method.named_buffers() if name == "kept") / len(weights)
        return {"weights": int((weights > 0).sum()), "held": held, **attacked(student, seed)}

    rows = {
        "scratch": made("scratch"),
        "kd": made("kd"),
        "pruned, then adversarial training": PrunedFirst(),
        "robust_prune": made("robust_prune", **options),
    }
    yield from students(rows, seed, only, many(), budget=SPARSE_BUDGET, of=of, about=found)
    small = {"adversarial training, small network": AdversarialTraining()}
    yield from students(small, seed, only, many(), budget=SPARSE_BUDGET, of=of, about=found, size=SMALL)


def about_sparse(rows: Rows) -> str:
    shown = [
        [row, *(rows.mean(row, key) for key in ("top1", "robust", "sanity")),
         f"{rows.values(row, 'weights')[0]:,.0f}" if row in rows.students() else ""]
        for row in rows.lines
    ]  # fmt: skip
    rivals = ("pruned, then adversarial training", "adversarial training, small network")
    said = [rows.says("robust_prune", rival, key="robust") for rival in rivals]
    held = statistics.mean(rows.values("robust_prune", "held"))
    return (
        f"{under_attack(rows, SPARSE_BUDGET)} robust_prune leaves a tenth of the single weights; so does the"
        f" rival, which trains without an attack, prunes at {PRUNED_AT:.0%} of the training and trains the rest under"
        " attack; the small network has about as many weights, all of them. The robust teacher teaches kd too.\n\n"
        f"{table(['', 'as they are', 'PGD-20', 'must fail', 'weights'], shown)}\n\nUnder PGD-20 {'; '.join(said)}."
        f" Beside the weights and the optimiser's moments robust_prune holds {held:.0f} number for each weight, which"
        " of them are kept; ADMM would hold two copies of the weights more."
    )


STUDIES = {
    "squeezed": Study("Attention in a hierarchy (`squeezed_adversarial`)", squeezed, about_squeezed),
    "bss": Study("Samples at the boundary (`bss`)", bss, about_bss),
    "ard": Study("Robust accuracy (`ard`)", ard, about_ard),
    "sparse": Study("Robust with a tenth of the weights (`robust_prune`)", sparse, about_sparse),
    "dfad": Study(
        "Without data (`dfad`)", partial(dfad, DFAD_BUDGET, True), partial(about_dfad, DFAD_BUDGET, True)
    ),
    "dfad_long": Study(
        "Without data, for four times as long (`dfad`)", partial(dfad, LONG_BUDGET, False),
        partial(about_dfad, LONG_BUDGET, False),
    ),
}  # fmt: skip

if __name__ == "__main__":
    command(__doc__ or "", "adversarial", STUDIES)

"""LMA by its number of segments and by the size of the student, on the digits: Xu et al., AAAI 2020.

PYTHONPATH=benchmarks python benchmarks/methods/lma.py [--seeds 0 1 2 3 4] > FILE
PYTHONPATH=benchmarks python benchmarks/methods/lma.py --report FILE [FILE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

from comparison import Result, Rows, Study, command, few, made, setting, teacher, wanted
from every_method import BUDGET, IMAGES, accuracy, fit
from results import table

from edgekd import networks

# The paper's students, the smallest first; and that one again, trained for longer. Sizes, and epochs.
SIZES = {"student 3": 3, "student 2": 2, "student 1": 1}
LONG, TIMES = "student 3 for longer", 4
STUDENTS = {
    **{name: (size, BUDGET.epochs) for name, size in SIZES.items()},
    LONG: (3, TIMES * BUDGET.epochs),
}
SEGMENTS = (2, 4, 8, 12)
ACTIVATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ReLU": ("relu", {}),
    **{f"LMA-{k}": ("lma", {"k": k}) for k in SEGMENTS},
}
# Of LMA-8 over ReLU on CIFAR-10, in points; and what the smallest student was expected to gain here.
PAPER, EXPECTED = {"student 3": 4.33, "student 2": 2.99, "student 1": 1.83}, 1.0


def sizes(seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Students of three sizes with each activation, by the paper's distillation."""
    dataset = few(IMAGES)
    rows = {f"{name}, {student}": (about, *STUDENTS[student]) for student in STUDENTS
            for name, about in ACTIVATIONS.items()}  # fmt: skip
    for row, (activation, size, epochs) in wanted(rows, only).items():
        answers, *_ = dataset.outputs
        student = networks.build("lma_student", {"size": size}, dataset.shape, answers, activation, seed)
        budget, method = BUDGET.model_copy(update={"epochs": epochs}), made("kd", kd_weight=0.7, temperature=2.0)
        fit(student, dataset, budget, method, teacher(seed), seed)
        params = networks.count_params(student)
        yield {"row": row, "is_student": True, "top1": accuracy(student, dataset), "params": params}


def about_sizes(rows: Rows) -> str:
    def mean(activation: str, student: str) -> float:
        return statistics.mean(rows.values(f"{activation}, {student}"))

    lines = []
    for name in ACTIVATIONS:
        lines.append([name, *(rows.mean(f"{name}, {student}") for student in STUDENTS)])
        if name != "ReLU":
            over = [rows.gain(f"{name}, {student}", f"ReLU, {student}") for student in STUDENTS]
            lines.append([f"{name} over ReLU", *over])
    lines.append(["the paper's LMA-8 over ReLU", *(f"{PAPER[student]:+.2f}" for student in SIZES), ""])
    params = [f"{rows.values(f'ReLU, {student}', 'params')[0]:,.0f}" for student in STUDENTS]
    header = ["", *(f"{student}, {count} parameters" for student, count in zip(STUDENTS, params, strict=True))]
    gains = {name: [mean(name, student) - mean("ReLU", student) for student in SIZES] for name in ACTIVATIONS}
    shrinking = [name for name, own in gains.items() if all(first > second for first, second in pairwise(own))]
    verdict = "As in the paper" if "LMA-8" in shrinking else "Not as in the paper"

    def steps(student: str) -> str:
        from_four, from_eight = (
            mean(more, student) - mean(fewer, student) for more, fewer in (("LMA-8", "LMA-4"), ("LMA-12", "LMA-8"))
        )
        return f"{from_four:+.2f} and {from_eight:+.2f} for {student}"

    two = ", ".join(f"{mean('LMA-2', student) - mean('ReLU', student):+.2f} for {student}" for student in STUDENTS)
    return (
        f"{setting(rows, few(IMAGES), student='one of the LMA paper')} `kd` has the paper's weight 0.7 and temperature"
        f" 2; the last column's students have {TIMES} times the epochs.\n\n{table(header, lines)}\n\n"
        f"{rows.says('LMA-8, student 3', 'ReLU, student 3', EXPECTED)}. {verdict}, where the gain of LMA-8 shrinks as"
        f" the student grows: it shrinks from size to size for {' and '.join(shrinking) or 'no number of segments'}."
        f" Two segments, which the paper does not have, were expected to do as ReLU does; they are {two}. From four to"
        " eight segments, where the paper's figure rises strongly, and on to twelve, where it falls slightly:"
        f" {'; '.join(steps(student) for student in STUDENTS)}. Even the longer trainings are short beside the paper's"
        " 200 epochs of 50,000 images."
    )


STUDIES = {"sizes": Study("LMA by segments and by the student's size", sizes, about_sizes)}

if __name__ == "__main__":
    command(__doc__ or "", "lma", STUDIES)

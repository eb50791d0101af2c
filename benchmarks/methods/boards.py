"""A student on several boards, of which some are silent, on the digits: `spread`.

PYTHONPATH=benchmarks python benchmarks/methods/boards.py [--studies four] [--seeds 0 1 2] > FILE
PYTHONPATH=benchmarks python benchmarks/methods/boards.py --report FILE [FILE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comparison import Result, Rows, Study, command, few, made, many, setting, teacher, wanted
from every_method import BUDGET, IMAGES, TEACHER, fit, network
from results import table

from edgekd import networks
from edgekd.data import Dataset
from edgekd.recipe import Train
from edgekd.stages.spreading import SUBSETS, silences

FILTERS = 32
PART = {"network": "resnet", "depth": 8, "width": 0.15}
HALF_IS_KEPT = 0.9
# Row: copies, method, options.
Row = tuple[int, str, Mapping[str, Any]]
LOUVAIN = {"partition": "louvain"}
SPREAD: dict[str, Row] = {
    "spread": (1, "spread", {}),
    "spread, 2 copies": (2, "spread", {}),
    "spread, Louvain": (1, "spread", LOUVAIN),
    "spread, Louvain, 2 copies": (2, "spread", LOUVAIN),
}
FOUR: dict[str, Row] = {
    "scratch": (1, "scratch", {}),
    "kd": (1, "kd", {}),
    "spread, no silence in training": (1, "spread", {"silent": 0.0}),
    "spread, no imitation": (1, "spread", {"feature_weight": 0.0}),
    "spread, no imitation, silent 0.5": (1, "spread", {"feature_weight": 0.0, "silent": 0.5}),
    **SPREAD,
}
EIGHT: dict[str, Row] = {"kd": (1, "kd", {}), **SPREAD}
LONG_BUDGET = BUDGET.model_copy(update={"epochs": 15})


@dataclass(frozen=True)
class Boards:
    """Students of so many boards, each asked with every set of silent ones. images: labelled ones; None is all."""

    count: int
    rows: Mapping[str, Row]
    images: int | None = IMAGES
    budget: Train = BUDGET

    @property
    def dataset(self) -> Dataset:
        return many() if self.images is None else few(self.images)

    def run(self, seed: int, only: Sequence[str]) -> Iterator[Result]:
        dataset = self.dataset
        for row, (copies, name, options) in wanted(self.rows, only).items():
            chosen = {"part": PART, "boards": self.count, "copies": copies, "filters": FILTERS}
            student = networks.build("spread", chosen, dataset.shape, dataset.num_classes, ("relu", {}), seed)
            fit(student, dataset, self.budget, made(name, **options), teacher(seed), seed)
            with torch.no_grad():
                x = torch.from_numpy(dataset.normalized("test"))
                features = torch.stack([part(x) for part in student.eval().parts], 1).numpy()
                head = lambda heard: student.head(torch.from_numpy(heard)).detach().numpy()  # noqa: E731, B023
                found = silences(features, head, dataset.judge("test").score)
            sizes = [networks.count_params(part) for part in student.parts]
            yield {"row": row, "is_student": True, "part": statistics.mean(sizes), "top1": 100 * found[0]["score"],
                   **{f"silent_{one['silent']}": 100 * one["score"] for one in found}}  # fmt: skip

    def report(self, rows: Rows) -> str:
        half = f"silent_{self.count // 2}"
        kept = {row: statistics.mean(rows.values(row, half)) / statistics.mean(rows.values(row)) for row in rows.lines}
        lines = [
            [row, *(rows.mean(row, f"silent_{silent}", 1) for silent in range(self.count)), f"{kept[row]:.0%}"]
            for row in self.rows
            if row in rows.lines
        ]
        header = ["", *(f"{silent} silent" for silent in range(self.count)), "kept with half silent"]
        share = statistics.mean(rows.values("spread", "part")) / networks.count_params(network(TEACHER, many(), 0))
        student = f"{self.count} ResNet-8 of {share:.1%} of the parameters of its teacher"
        enough = [f"`{row}`" for row, left in kept.items() if left >= HALF_IS_KEPT]
        said = [rows.says(row, base) for row, base in (
            ("spread", "kd"), ("spread, 2 copies", "spread"), ("spread, Louvain", "spread")
        )]  # fmt: skip
        with_silent = [rows.says(row, "spread", key=half) for row in list(SPREAD)[1:3]]
        return (
            f"{setting(rows, self.dataset, self.budget, student)} With silent boards it is the mean over all sets of"
            f" that many of them (of more than {SUBSETS} sets, over {SUBSETS} that are drawn).\n\n"
            f"{table(header, lines)}\n\nWith all boards {'; '.join(said)}. With half of them silent"
            f" {'; '.join(with_silent)}. At least {HALF_IS_KEPT:.0%} of the accuracy are kept with half of the boards"
            f" silent by: {'; '.join(enough) or 'none'}."
        )


FLEETS = {
    "four": ("Four boards, some of them silent (`spread`)", Boards(4, FOUR)),
    "eight": ("Eight boards, some of them silent (`spread`)", Boards(8, EIGHT)),
    "four_long": ("Four boards that have seen all images (`spread`)", Boards(4, EIGHT, None, LONG_BUDGET)),
}
STUDIES = {name: Study(title, boards.run, boards.report) for name, (title, boards) in FLEETS.items()}

if __name__ == "__main__":
    command(__doc__ or "", "boards", STUDIES)

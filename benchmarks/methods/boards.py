"""A student on several boards, of which some are silent, on the digits: `spread`.

PYTHONPATH=benchmarks python benchmarks/methods/boards.py [--studies four] [--seeds 0 1 2] > FILE
PYTHONPATH=benchmarks python benchmarks/methods/boards.py --report FILE [FILE ...]
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from comparison import Result, Rows, Study, command, few, made, many, setting, spread_of, teacher, wanted
from digits import BUDGET, IMAGES, TEACHER, fit, network
from results import table

from edgekd import networks, registry
from edgekd.stages.spreading import SUBSETS, silences

FILTERS = 32
PART = {"network": "resnet", "depth": 8, "width": 0.15}
HALF_IS_KEPT = 0.9
# Row: copies, method, options.
Row = tuple[int, str, Mapping[str, Any]]
SPREAD: dict[str, Row] = {"spread": (1, "spread", {}), "spread, 2 copies": (2, "spread", {})}
if "partition" in registry.entry("method", "spread").options:
    louvain = {"partition": "louvain"}
    SPREAD |= {"spread, Louvain": (1, "spread", louvain), "spread, Louvain, 2 copies": (2, "spread", louvain)}
FOUR: dict[str, Row] = {
    "scratch": (1, "scratch", {}),
    "kd": (1, "kd", {}),
    "spread, no silence in training": (1, "spread", {"silent": 0.0}),
    **SPREAD,
}
EIGHT: dict[str, Row] = {"kd": (1, "kd", {}), **SPREAD}


def spread(boards: int, rows: Mapping[str, Row], seed: int, only: Sequence[str]) -> Iterator[Result]:
    """Train students of so many boards, and ask each with every set of silent ones."""
    dataset = few(IMAGES)
    for row, (copies, name, options) in wanted(rows, only).items():
        chosen = {"part": PART, "boards": boards, "copies": copies, "filters": FILTERS}
        student = networks.build("spread", chosen, dataset.shape, dataset.num_classes, ("relu", {}), seed)
        fit(student, dataset, BUDGET, made(name, **options), teacher(seed), seed)
        with torch.no_grad():
            x = torch.from_numpy(dataset.normalized("test"))
            features = torch.stack([part(x) for part in student.eval().parts], 1).numpy()
            head = lambda heard: student.head(torch.from_numpy(heard)).detach().numpy()  # noqa: E731, B023
            found = silences(features, head, dataset.judge("test").score)
        sizes = [networks.count_params(part) for part in student.parts]
        yield {"row": row, "is_student": True, "part": statistics.mean(sizes), "top1": 100 * found[0]["score"],
               **{f"silent_{one['silent']}": 100 * one["score"] for one in found}}  # fmt: skip


def about(boards: int, rows: Rows) -> str:
    lines, half = [], boards // 2
    kept = {
        row: statistics.mean(rows.values(row, f"silent_{half}")) / statistics.mean(rows.values(row, "silent_0"))
        for row in rows.students()
    }
    for row in rows.students():
        shown = [spread_of(rows.values(row, f"silent_{silent}"), 1) for silent in range(boards)]
        lines.append([row, *shown, f"{kept[row]:.0%}"])
    header = ["", *(f"{silent} silent" for silent in range(boards)), "kept with half silent"]
    whole = networks.count_params(network(TEACHER, many(), 0))
    share = statistics.mean(rows.values("spread", "part")) / whole
    enough = [f"`{row}`" for row, left in kept.items() if left >= HALF_IS_KEPT]
    return (
        f"{setting(rows, few(IMAGES), student=f'{boards} ResNet-8 of {share:.1%} of the parameters of its teacher')}"
        " With silent boards it is the mean over all sets of that many of them (of more than"
        f" {SUBSETS} sets, over {SUBSETS} that are drawn).\n\n{table(header, lines)}\n\n{rows.says('spread', 'kd')},"
        f" with all boards. At least {HALF_IS_KEPT:.0%} of the accuracy are kept with half of the boards silent by:"
        f" {'; '.join(enough) or 'none'}."
    )


STUDIES = {
    name: Study(
        f"{name.title()} boards, some of them silent (`spread`)", partial(spread, boards, rows), partial(about, boards)
    )
    for name, boards, rows in (("four", 4, FOUR), ("eight", 8, EIGHT))
}

if __name__ == "__main__":
    command(__doc__ or "", "boards", STUDIES)

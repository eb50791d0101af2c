"""Comparisons of students over several seeds: what a study is, how it is run, and what its section says.

A study prints a line of JSON for every student. Its section of docs/results.md is written from its own lines alone, so
each can be run, and written, without the others.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from every_method import BUDGET, STUDENT, TEACHER, TEACHER_BUDGET, accuracy, fit, network
from results import gain, spread_of, table, write_section
from torch import nn

from edgekd import data, registry
from edgekd.data import Dataset
from edgekd.methods import Method
from edgekd.recipe import Train

Result = dict[str, Any]


@dataclass(frozen=True)
class Study:
    """A section of its own. run: the seed, and the rows that are wanted (none is all), to results, each with a `row`.

    report: from the rows found to the section's text.
    """

    title: str
    run: Callable[[int, Sequence[str]], Iterator[Result]]
    report: Callable[[Rows], str]


class Rows:
    """The results of a study by row, in the order of the seeds; of a line that comes twice, the last."""

    def __init__(self, lines: Sequence[Result]) -> None:
        own = {(line["seed"], line["row"]): line for line in lines}
        self.seeds = sorted({seed for seed, _ in own})
        self.lines: dict[str, list[Result]] = {}
        for (_, row), line in sorted(own.items(), key=lambda item: int(item[0][0])):
            self.lines.setdefault(row, []).append(line)

    def values(self, row: str, key: str = "top1") -> list[float]:
        """One of each seed."""
        return [float(line[key]) for line in self.lines[row]]

    def mean(self, row: str, key: str = "top1", digits: int = 2) -> str:
        """`95.54 ± 0.28`, over the seeds."""
        return spread_of(self.values(row, key), digits)

    def gain(self, row: str, base: str, key: str = "top1") -> str:
        """Within seeds, mean (range); nothing against itself."""
        return "" if row == base else gain(self.values(row, key), self.values(base, key))

    def students(self) -> list[str]:
        """The rows that are no teachers, sources or facts: those with a student."""
        return [row for row, lines in self.lines.items() if lines[0].get("is_student")]

    def says(self, row: str, base: str, margin: float = 0.0, key: str = "top1") -> str:
        """In words, whether a row is above another one, by as much as was expected, in the mean."""
        change = statistics.mean(self.values(row, key)) - statistics.mean(self.values(base, key))
        if not margin:
            how = "above" if change > 0 else "not above"
            return f"`{row}` is {how} `{base}` in the mean ({change:+.2f} points)"
        how = "at least" if change >= margin else "not"
        return f"`{row}` against `{base}`: {change:+.2f} points in the mean, {how} the {margin:+g} that were expected"


def compared(rows: Rows, bases: Sequence[str] = ("scratch", "kd"), **columns: str) -> str:
    """A table of all rows with an accuracy, with the gains over some, and who is not above the last of these.

    columns: further ones, header by key of the results.
    """
    shown = [row for row in rows.lines if "top1" in rows.lines[row][0]]
    lines = []
    for row in shown:
        gains = [rows.gain(row, base) if row in rows.students() and row != bases[0] else "" for base in bases]
        more = [rows.mean(row, key) if key in rows.lines[row][0] else "" for key in columns.values()]
        lines.append([row, rows.mean(row), *gains, *more])
    last = bases[-1]
    kd = statistics.mean(rows.values(last))
    below = [f"`{row}`" for row in rows.students() if row not in bases and statistics.mean(rows.values(row)) <= kd]
    header = ["", "accuracy", *(f"over {base}" for base in bases), *columns]
    return f"{table(header, lines)}\n\nNot above `{last}` in the mean: {'; '.join(below) or 'none'}."


def made(name: str, **options: Any) -> Method:
    """A registered method."""
    method: Method = registry.create("method", name, options=options)
    return method


@functools.cache
def many() -> Dataset:
    """All digits."""
    return data.load("digits", {})


@functools.cache
def few(images: int) -> Dataset:
    """As many labelled ones, of which a tenth validates; and all test images."""
    return data.load("digits", {}, train_limit=images)


@functools.cache
def teacher(seed: int) -> nn.Module:
    """One that has seen all training images."""
    trained = network(TEACHER, many(), seed)
    fit(trained, many(), TEACHER_BUDGET, made("scratch"), None, seed)
    return trained.requires_grad_(False)


def wanted(rows: Mapping[str, Any], only: Sequence[str]) -> dict[str, Any]:
    """Those that were asked for; all, where none was."""
    return {row: about for row, about in rows.items() if not only or row in only}


def students(
    rows: Mapping[str, Method],
    seed: int,
    only: Sequence[str],
    dataset: Dataset,
    *,
    budget: Train = BUDGET,
    size: Mapping[str, Any] = STUDENT,
    of: nn.Module | None = None,
    about: Callable[[nn.Module, Method], Result] = lambda student, method: {},
) -> Iterator[Result]:
    """Train a student by each method, and tell its accuracy, the first and last epoch's log, and what `about` says.

    of: their teacher, in place of the seed's.
    """  # fmt: skip
    for row, method in wanted(rows, only).items():
        student = network(dict(size), dataset, seed)
        epochs = fit(student, dataset, budget, method, teacher(seed) if of is None else of, seed)
        logged = {f"{when}_{name}": value for when, epoch in (("first", epochs[0]), ("last", epochs[-1]))
                  for name, value in epoch.items() if name.startswith("train_")}  # fmt: skip
        found = {"top1": accuracy(student, dataset), **logged, **about(student, method)}
        yield {"row": row, "is_student": True, **found}


def setting(rows: Rows, dataset: Dataset, budget: Train = BUDGET, student: str = "a ResNet-8 of half the width") -> str:
    """What all rows have in common, in words."""
    return (
        f"Digits, {len(rows.seeds)} seeds: accuracy in percent of {len(dataset.test)} test images, mean ± standard"
        f" deviation; gains are differences within seeds, mean (range). The student, {student}, learns from"
        f" {len(dataset.train)} labelled images for {budget.epochs} epochs; the teacher, a ResNet-14 of half the width,"
        " has seen the whole training split. Within a seed everything but the row is the same; every method has the"
        " defaults of its options unless its row says otherwise."
    )


def command(about: str, script: str, studies: Mapping[str, Study]) -> None:
    """The command line of a script: train, or write sections from what was printed."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", default=list(studies), choices=studies)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[], help="rows to train; default: all")
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.report:
        for seed in given.seeds:
            for name in given.studies:
                for line in studies[name].run(seed, given.only):
                    print(json.dumps({"study": name, "seed": seed, **line}), flush=True)
        return
    lines = [json.loads(line) for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
    for name in given.studies:
        if own := [line for line in lines if line["study"] == name]:
            text = f"{studies[name].report(Rows(own))}\n\nMade by `benchmarks/methods/{script}.py`."
            write_section(f"methods_{script}_{name}", studies[name].title, text)

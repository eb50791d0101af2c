"""Latencies as the agent writes them: one row a query, and how they compare."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgekd.stats import Floats

# int64 [N, 6], in time order: the launch, its block, when the query began (or arrived), how long its answer took from
# then on, how many samples it had, and how long of the time it waited for its turn. Times in ns.
Table = npt.NDArray[np.int64]
LAUNCH, BLOCK, START, DURATION, SAMPLES, WAITED = range(6)


def of_batch(table: Table, samples: int) -> Table:
    """The queries of so many samples."""
    return np.asarray(table[table[:, SAMPLES] == samples])


def computing_ns(table: Table) -> npt.NDArray[np.int64]:
    """How long each query was computed, [N]."""
    return np.asarray(table[:, DURATION] - table[:, WAITED])


def rounds(table: Table) -> list[Table]:
    """The table, of queries of one size, cut into rounds: two blocks each."""
    launch, block = table[:, LAUNCH], table[:, BLOCK]
    return np.split(table, np.flatnonzero((np.diff(launch) != 0) | (np.diff(block // 2) != 0)) + 1)


def speedups(student: Table, teacher: Table) -> Floats:
    """Teacher's time to compute a query over student's, by launch.

    Rounds are compared with themselves, so that what slows both falls out. A launch counts as one observation, so that
    the interval holds for the next launch too (T. Kalibera and R. Jones, "Rigorous benchmarking in reasonable time",
    ISMM 2013: repeat at the highest level that varies).
    """
    ratios: dict[int, list[float]] = {}
    for ours, theirs in zip(rounds(student), rounds(teacher), strict=True):
        ratio = float(np.median(computing_ns(theirs)) / np.median(computing_ns(ours)))
        ratios.setdefault(int(ours[0, LAUNCH]), []).append(ratio)
    return np.array([np.median(of_launch) for of_launch in ratios.values()])

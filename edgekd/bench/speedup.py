"""How much faster one model is than another that was timed in turn with it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgekd.stats import Floats


def speedups(student: npt.NDArray[np.int64], teacher: npt.NDArray[np.int64]) -> Floats:
    """Teacher's time over student's, by launch.

    Rounds are compared with themselves, so that what slows both falls out. A launch counts as one observation, so that
    the interval holds for the next launch too (T. Kalibera and R. Jones, "Rigorous benchmarking in reasonable time",
    ISMM 2013: repeat at the highest level that varies).
    """
    ratios: dict[int, list[float]] = {}
    for ours, theirs in zip(rounds(student), rounds(teacher), strict=True):
        ratios.setdefault(int(ours[0, 0]), []).append(float(np.median(theirs[:, 3]) / np.median(ours[:, 3])))
    return np.array([np.median(of_launch) for of_launch in ratios.values()])


def rounds(table: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The table cut into rounds: two blocks each."""
    launch, block = table[:, 0], table[:, 1]
    return np.split(table, np.flatnonzero((np.diff(launch) != 0) | (np.diff(block // 2) != 0)) + 1)

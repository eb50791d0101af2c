"""How the loop nests run on an NVIDIA GPU: products by tiles in shared memory, everything else fused into them.

The functions are those of the CPU, with the channels last and vectors of one value: a convolution is a product of the
image's patches with a matrix, and the channels that neighbouring threads read lie side by side. TVM's own rules
schedule them, and one of ours what they would take apart: a short sum for each value of a big output.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.base import ScheduleRule

from edgekd.backends.tvm.processor import Processor
from edgekd.backends.tvm.schedules import Nest

THREADS = 128  # of a block


def gpu_schedules(processor: Processor) -> Any:
    """The pass that schedules every function by the first rule that fits it."""
    gpu = dlight.gpu
    rules = (
        gpu.Matmul(), gpu.GEMV(), ShortSums(processor), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
    )  # fmt: skip
    return dlight.ApplyDefaultSchedule(*map(Attempt, rules))


def launches(function: Any) -> int:
    """How many kernels a scheduled function is: each of its outermost loop nests is one."""
    nests = function.body.block.body
    return len(nests.seq) if isinstance(nests, tirx.SeqStmt) else 1


class Attempt(ScheduleRule):  # type: ignore[misc]
    """A rule of TVM's, whose failure leaves a function to the next one: they fail in many ways on what does not fit."""

    def __init__(self, rule: Any) -> None:
        self.rule = rule

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """The schedule, or nothing."""
        try:
            return self.rule.apply(func, target, tunable)
        except Exception as error:
            last = (str(error).strip().splitlines() or [""])[-1]
            print(f"{type(self.rule).__name__} does not fit a function: {type(error).__name__}: {last}")
            return None


class ShortSums(ScheduleRule):  # type: ignore[misc]
    """Depthwise and grouped convolutions and pools: a thread makes one value of the output, with what is done to it."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """The schedule, or nothing for a function that is not one sum, or of sums longer than the output."""
        del target, tunable
        if not isinstance(func, tirx.PrimFunc) or not func.attrs.get("s_tir", True):
            return None
        schedule = s_tir.Schedule(func)
        nest = Nest(schedule, self.processor)
        if len(nest.reductions) != 1:
            return None
        (main,) = nest.reductions
        values, sums = ([nest.extent(loop) or 1 for loop in loops] for loops in nest.loops(main))
        if not values or math.prod(sums) > math.prod(values):
            return None
        *between, last = [main, *nest.after(main)]
        for block in [*nest.before(main), *between[1:]]:
            schedule.compute_inline(block)
        image, *rest = nest.loops(last)[0]
        if rest and not nest.extent(image):  # what is fused with a number of images that is open is not understood
            schedule.bind(image, "blockIdx.y")
        else:
            rest = [image, *rest]
        outer, thread = schedule.split(schedule.fuse(*rest), [None, THREADS])
        schedule.bind(outer, "blockIdx.x")
        schedule.bind(thread, "threadIdx.x")
        if between:
            schedule.compute_at(main, thread, preserve_unit_loops=True)
            schedule.set_scope(main, 0, "local")
        with contextlib.suppress(s_tir.ScheduleError):  # then the first turn of the sum sets it to zero
            schedule.decompose_reduction(main, schedule.get_loops(main)[-len(sums)])
        return schedule

"""How the loop nests run on a CPU: tiles that stay in registers, vectors along the channels, everything else fused in.

A function as TVM fuses it is one product (convolution, dense), pool or mean, with what is computed of its input before
and of its output after. The product's tile is a few pixels by a few vectors of channels, as many sums as registers
hold; bias, residual, ReLU or LMA are applied to the tile before it is stored, so an activation costs no pass over
memory.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.base import ScheduleRule

from edgekd.backends.tvm.processor import Processor
from edgekd.backends.tvm.products import DEPTHWISE, INTEGER_PRODUCT, LOOKED_UP, PADDED, PRODUCT

# Read by more blocks than this, a value of the epilogue is kept in the tile in place of being computed again.
MAX_COPIES = 2
# A loop that no vector divides is one long vector up to this many registers, which LLVM splits.
MAX_VECTORS = 4
# Below this many values a loop is not worth waking other threads for.
WORTH_THREADS = 16384
# So many sums hide the latency of a multiplication, and more of them leave the epilogue no registers for its numbers.
SUMS = 16
# A dot product, or one channel's alone, takes operands from memory: more sums than these make it slower.
DOT_SUMS = 8
# What differs between kernels that take equal time: numbers, and what Relax calls the inputs.
_NAMES = re.compile(r"T\.float32\([^)]*\)|\blv\d*\b")


class Plan(NamedTuple):
    """What a rule may choose: the tile of the innermost loops, the order of the outer ones, and what is unrolled."""

    rows: int  # of pixels
    columns: int
    vectors: int  # of channels
    image_first: bool = False  # the image is the outermost loop, and all channels of a tile follow each other
    unroll: int = 1  # input channels of one turn of the innermost sum

    @property
    def sums(self) -> int:
        """Registers that hold sums."""
        return self.rows * self.columns * self.vectors

    @property
    def loads(self) -> float:
        """Values loaded for one multiplication: every pixel and every weight is used for the whole tile."""
        return (self.rows * self.columns + self.vectors) / self.sums


def tiles(rows: int, columns: int, vectors: int, registers: int) -> list[Plan]:
    """The tiles that divide the sizes and fit into the registers, the best guess first.

    That is the one that loads least, in doubt the smaller one, of those with up to SUMS. Each vector of weights takes a
    register too, and one is left for a pixel.
    """
    found = (Plan(*sizes) for sizes in itertools.product(_divisors(rows), _divisors(columns), _divisors(vectors)))
    fitting = (tile for tile in found if tile.sums + tile.vectors < registers)
    return sorted(fitting, key=lambda tile: (tile.sums > SUMS, tile.loads, tile.sums))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, min(number, 32) + 1) if number % size == 0]


def cpu_schedules(processor: Processor, chosen: Mapping[str, Plan]) -> Any:
    """The pass that schedules every function: as `chosen` for its task (see `task_of`), or by best guess."""
    return dlight.ApplyDefaultSchedule(*(rule(processor, chosen) for rule in RULES))


def task_of(function: Any) -> str:
    """The sha256 of what a function computes, whatever its name and the numbers in it: equal ones take equal time."""
    text = _NAMES.sub("_", function.without_attr("global_symbol").script())
    return hashlib.sha256(text.encode()).hexdigest()


def plans_of(function: Any, processor: Processor) -> list[Plan]:
    """The plans for a function, the best guess first; none when there is nothing to choose."""
    for rule in (kind(processor, {}) for kind in RULES):
        nest = Nest(s_tir.Schedule(function), processor)
        if nest.blocks and rule.fits(nest):
            return list(rule.plans(nest))
    return []


class Rule(ScheduleRule):  # type: ignore[misc]
    """Schedules a function of which the rule knows the main block; others it leaves alone."""

    def __init__(self, processor: Processor, chosen: Mapping[str, Plan]) -> None:
        self.processor, self.chosen = processor, chosen

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:
        """The schedule, or nothing."""
        del target, tunable
        if not isinstance(func, tirx.PrimFunc) or not func.attrs.get("s_tir", True):
            return None
        nest = Nest(s_tir.Schedule(func), self.processor)
        if not nest.blocks or not self.fits(nest):
            return None
        try:
            plan = self.chosen.get(task_of(func)) if self.chosen else None
            self.transform(nest, plan or next(iter(self.plans(nest)), None))
        except s_tir.ScheduleError as error:
            print(f"{func.attrs.get('global_symbol', 'a function')} is computed in plain loops: {error}")
            return None
        return nest.schedule

    def fits(self, nest: Nest) -> bool:
        """Whether the function is of this rule's kind."""
        raise NotImplementedError

    def plans(self, nest: Nest) -> Iterator[Plan]:
        """What may be chosen, the best guess first; nothing by default."""
        del nest
        yield from ()

    def transform(self, nest: Nest, plan: Any) -> None:
        """Schedule it, as planned where there are plans."""
        raise NotImplementedError


class Nest:
    """A function's blocks in order, and what all rules do with them."""

    def __init__(self, schedule: Any, processor: Processor) -> None:
        self.schedule, self.processor = schedule, processor
        self.blocks = list(schedule.get_child_blocks(schedule.get_sblock("root")))
        self._names = [self.name(block) for block in self.blocks]  # one that is inlined has no name any more
        self.reductions = [block for block in self.blocks if self.reduces(block)]

    def name(self, block: Any) -> str:
        """What the block is called."""
        return str(self.schedule.get(block).name_hint)

    def reduces(self, block: Any) -> bool:
        """Whether it sums over something."""
        return any(int(axis.iter_type) == tirx.IterVar.CommReduce for axis in self.schedule.get(block).iter_vars)

    def loops(self, block: Any) -> tuple[list[Any], list[Any]]:
        """Loops over the output of a block, and those that it sums over."""
        kinds = [int(axis.iter_type) for axis in self.schedule.get(block).iter_vars]
        loops = list(self.schedule.get_loops(block))
        pairs = list(zip(loops, kinds, strict=True))
        spatial = [loop for loop, kind in pairs if kind != tirx.IterVar.CommReduce]
        return spatial, [loop for loop, kind in pairs if kind == tirx.IterVar.CommReduce]

    def extent(self, loop: Any) -> int:
        """How often it runs; 0 when that is known at run time only."""
        extent = self.schedule.get(loop).extent
        return int(extent) if isinstance(extent, tirx.IntImm) else 0

    def before(self, main: Any) -> list[Any]:
        """The blocks before the main one, in order."""
        return self.blocks[: self._names.index(self.name(main))]

    def after(self, main: Any) -> list[Any]:
        """The blocks behind the main one, in order."""
        return self.blocks[self._names.index(self.name(main)) + 1 :]

    def prepare_inputs(self, main: Any) -> None:
        """What comes before the main block is computed where it is read; only the zeros around an image are stored."""
        for block in self.before(main):
            if self.name(block) != PADDED:
                self.schedule.compute_inline(block)
                continue
            *outer, last = self.schedule.get_loops(block)
            self.vectorize(last)
            self.parallel(outer[:2])

    def attach_epilogue(self, main: Any, depth: int) -> None:
        """Compute what follows on the tile of the main block, which is what lies within its `depth` outer loops."""
        schedule, blocks = self.schedule, self.after(main)
        if not blocks:
            schedule.cache_write(main, 0, "global")
            blocks = list(schedule.get_consumers(main))
        *between, last = blocks
        looked_up = bool(between) and self.name(last) == LOOKED_UP
        kept = []
        for block in between:
            if len(schedule.get_consumers(block)) > MAX_COPIES or (looked_up and block is between[-1]):
                kept.append(block)
            else:
                schedule.compute_inline(block)
        stored = [last]
        if looked_up:  # the codes of the whole tile at once, which fill registers
            stored.append(schedule.cache_write(last, 0, "global"))
        tile = schedule.get_loops(main)[depth - 1]
        for block in [*kept, *stored]:
            schedule.reverse_compute_at(block, tile)
            loops = schedule.get_loops(block)[depth:]  # none for a single value
            if looked_up and block is last and loops:
                schedule.vectorize(schedule.fuse(*loops))
                continue
            for channels in loops[-1:]:
                self.vectorize(channels)
            for pixel in loops[:-1]:
                schedule.unroll(pixel)

    def initialise(self, main: Any, first_sum: Any, unrolled: int) -> None:
        """Set the sums of a tile to zero before the loop `first_sum`; `unrolled` loops stand around the vector.

        The last step: what is done to the loops of the tile must have been done by then.
        """
        *loops, vector = self.schedule.get_loops(self.schedule.decompose_reduction(main, first_sum))
        self.schedule.vectorize(vector)
        for loop in loops[len(loops) - unrolled :]:
            self.schedule.unroll(loop)

    def width(self, extent: int) -> int:
        """The vectors that a loop of this length is made of: one if none divides it, 1 value if that is too long."""
        lanes = self.processor.lanes
        divisors = [width for width in (lanes, lanes // 2, lanes // 4) if width > 1 and extent % width == 0]
        return divisors[0] if divisors else extent if 0 < extent <= MAX_VECTORS * lanes else 1

    def vectorize(self, loop: Any) -> None:
        """Run a loop in vectors."""
        if (width := self.width(self.extent(loop))) > 1:
            self.schedule.vectorize(self.schedule.split(loop, [None, width])[1])

    def parallel(self, loops: list[Any]) -> None:
        """Share the outer loops among the threads."""
        if self.processor.threads > 1:
            self.schedule.parallel(self.schedule.fuse(*loops))


class TiledRule(Rule):
    """Products by tiles whose sums stay in registers."""

    product: ClassVar[str]

    def fits(self, nest: Nest) -> bool:
        """Whether the function has exactly one product of this kind."""
        return [nest.name(block) for block in nest.reductions] == [self.product]

    def width(self, nest: Nest) -> int:
        """Output channels of one vector."""
        raise NotImplementedError

    def plans(self, nest: Nest) -> Iterator[Plan]:
        """Tiles, both orders of the outer loops, and how far the innermost sum is unrolled."""
        (main,) = nest.reductions
        (_, *space, channels), sums = nest.loops(main)
        rows, columns = [nest.extent(loop) for loop in space[-2:]] or (1, 1)
        blocks = nest.extent(channels) // self.width(nest)
        depth = nest.extent(sums[len(space)])
        for tile in tiles(rows, columns, blocks, self.processor.registers):
            for image_first, unroll in itertools.product((False, True), (1, 2, 4)):
                if depth % unroll == 0 and not (image_first and (blocks == tile.vectors or not space)):
                    yield tile._replace(image_first=image_first, unroll=unroll)


class ProductRule(TiledRule):
    """Convolution and dense: sums of a tile stay in registers."""

    product = PRODUCT

    def width(self, nest: Nest) -> int:
        """That of the packed weights."""
        return int(nest.schedule.get(nest.reductions[0]).reads[-1].source.shape[-1])

    def transform(self, nest: Nest, plan: Plan) -> None:
        """A vector of weights is multiplied by one input value."""
        (main,) = nest.reductions
        _, sums = nest.loops(main)
        first_sum, within, vector = tiled(nest, main, self.width(nest), sums, [], plan)
        nest.schedule.vectorize(vector)
        nest.initialise(main, first_sum, within)


class IntegerProductRule(TiledRule):
    """Convolution and dense of INT8 codes: four products and their sum are one instruction."""

    product = INTEGER_PRODUCT

    def width(self, nest: Nest) -> int:
        """Sums that one instruction makes."""
        assert nest.processor.dot is not None
        return nest.processor.dot.lanes

    def plans(self, nest: Nest) -> Iterator[Plan]:
        """The same, those with few sums first."""
        yield from sorted(super().plans(nest), key=lambda plan: plan.sums > DOT_SUMS)

    def transform(self, nest: Nest, plan: Plan) -> None:
        """A vector of quads of weights is multiplied by one quad of input values."""
        (main,), dot = nest.reductions, nest.processor.dot
        assert dot is not None
        _, (*sums, quad) = nest.loops(main)
        first_sum, within, vector = tiled(nest, main, dot.lanes, sums, [quad], plan)
        nest.initialise(main, first_sum, within)
        nest.schedule.tensorize(vector, dot.intrinsic())


def tiled(nest: Nest, main: Any, width: int, sums: list[Any], quad: list[Any], plan: Plan) -> tuple[Any, int, Any]:
    """Tiles, within them the sums over kernel and input, within these the loops of a tile; a volume's are in a plane.

    Returns the first loop of the sums, how many loops stand around the vector in a tile, and the vector.
    """
    schedule = nest.schedule
    (n, *space, channels), _ = nest.loops(main)
    nest.prepare_inputs(main)
    outer, vectors, vector = schedule.split(channels, [None, plan.vectors, width])
    parts = [schedule.split(loop, [None, size]) for loop, size in zip(space[-2:], plan[:2], strict=False)]
    image, pixels = [*space[:-2], *(part[0] for part in parts)], [part[1] for part in parts]
    *kernel, depth = sums
    turns, turn = schedule.split(depth, [None, plan.unroll])
    outside = [n, *image, outer] if plan.image_first else [n, outer, *image]
    schedule.reorder(*outside, *kernel, turns, turn, vectors, *pixels, vector, *quad)
    for loop in (*kernel[-1:], turn, vectors, *pixels):
        schedule.unroll(loop)
    nest.attach_epilogue(main, len(outside))
    nest.parallel(outside[:-1])
    return (kernel or [turns])[0], 1 + len(pixels), vector


class DepthwiseRule(Rule):
    """Depthwise convolution: the vector goes along the channels of input, kernel and output alike."""

    def fits(self, nest: Nest) -> bool:
        """Whether the function has exactly one depthwise convolution."""
        return [nest.name(block) for block in nest.reductions] == [DEPTHWISE]

    def plans(self, nest: Nest) -> Iterator[Plan]:
        """Tiles of one vector, the most nearly square ones of DOT_SUMS first, and both orders of the outer loops."""
        (*_, rows, columns, _), _ = nest.loops(nest.reductions[0])
        found = tiles(nest.extent(rows), nest.extent(columns), 1, self.processor.registers)
        for tile in sorted(found, key=lambda tile: (tile.sums > DOT_SUMS, -tile.sums, tile.rows + tile.columns)):
            yield tile
            yield tile._replace(image_first=True)

    def transform(self, nest: Nest, plan: Plan) -> None:
        """[n, rows, columns, channels] of tiles; within one the sums over the kernel."""
        schedule, (main,) = nest.schedule, nest.reductions
        (n, *planes, rows, columns, channels), sums = nest.loops(main)
        nest.prepare_inputs(main)
        width = nest.width(nest.extent(channels))
        blocks, vector = schedule.split(channels, [None, width])
        down, tile_rows = schedule.split(rows, [None, plan.rows])
        along, tile_columns = schedule.split(columns, [None, plan.columns])
        image = [*planes, down, along]
        outside = [n, *image, blocks] if plan.image_first else [n, blocks, *image]
        schedule.reorder(*outside, *sums, tile_rows, tile_columns, vector)
        schedule.vectorize(vector)
        for loop in (tile_rows, tile_columns, *sums):
            schedule.unroll(loop)
        nest.attach_epilogue(main, len(outside))
        nest.parallel(outside[:-1])
        nest.initialise(main, sums[0], 2)


class ReductionRule(Rule):
    """Pools and means over the image."""

    def fits(self, nest: Nest) -> bool:
        """Whether it has one reduction along a last dimension that is kept."""
        if len(nest.reductions) != 1 or nest.name(nest.reductions[0]) in (PRODUCT, INTEGER_PRODUCT, DEPTHWISE):
            return False
        spatial, sums = nest.loops(nest.reductions[0])
        return bool(spatial and sums) and nest.extent(spatial[-1]) > 1

    def transform(self, nest: Nest, plan: Any) -> None:
        """The vector goes along the last dimension."""
        del plan
        schedule, (main,) = nest.schedule, nest.reductions
        for block in nest.before(main):
            schedule.compute_inline(block)
        spatial, sums = nest.loops(main)
        blocks, vector = schedule.split(spatial[-1], [None, nest.width(nest.extent(spatial[-1]))])
        schedule.reorder(*spatial[:-1], blocks, *sums, vector)
        schedule.vectorize(vector)
        nest.attach_epilogue(main, len(spatial))
        nest.initialise(main, sums[0], 0)


class ElementwiseRule(Rule):
    """Functions without a reduction: one loop over all values."""

    def fits(self, nest: Nest) -> bool:
        """Whether nothing is summed."""
        return not nest.reductions

    def transform(self, nest: Nest, plan: Any) -> None:
        """All dimensions of fixed size are one loop, in vectors."""
        del plan
        schedule, (*others, last) = nest.schedule, nest.blocks
        for block in others:
            schedule.compute_inline(block)
        loops = list(schedule.get_loops(last))
        if not loops:
            return
        nest.vectorize(schedule.fuse(*loops) if all(map(nest.extent, loops)) else loops[-1])
        outer = schedule.get_loops(last)[0]
        if nest.extent(outer) * nest.processor.lanes >= WORTH_THREADS:
            nest.parallel([outer])


RULES = (ProductRule, IntegerProductRule, DepthwiseRule, ReductionRule, ElementwiseRule)

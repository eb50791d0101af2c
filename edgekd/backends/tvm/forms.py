"""Which form of LMA an engine gets: all that compute the layer are timed where kernels can be, else it is a rule."""

from __future__ import annotations

from typing import Any

from tvm import s_tir, te

from edgekd.backends.tvm.clock import Clock
from edgekd.backends.tvm.processor import Processor
from edgekd.backends.tvm.segments import Form, Segments, lma

VALUES = 4096  # 16 KB: what is timed is the arithmetic, as in a convolution's loop, and not memory
MARGIN = 0.95  # a form takes the place of a better guess when it needs no more than this share of the time


class FormChooser:
    """Chooses once for all layers of as many segments."""

    def __init__(self, processor: Processor, clock: Clock | None) -> None:
        self.processor, self.clock = processor, clock
        self.chosen: dict[tuple[int, tuple[Form, ...]], dict[str, Any]] = {}

    def __call__(self, segments: Segments) -> Form:
        """The form for a layer."""
        forms = tuple(segments.forms(self.processor.lanes))
        key = len(segments.slopes), forms
        if key not in self.chosen:
            self.chosen[key] = {"segments": key[0], **self._choose(forms, segments)}
        form: Form = self.chosen[key]["form"]
        return form

    def _choose(self, forms: tuple[Form, ...], segments: Segments) -> dict[str, Any]:
        """The form, and how long each takes in units of a ReLU over the same values, where that was measured."""
        if self.clock is None:
            return {"form": forms[0], "over_relu": None}
        relu, *took = self.clock.kernels([self._kernel(form, segments) for form in (None, *forms)])
        fastest = min(zip(took, forms, strict=True))
        chosen = fastest[1] if fastest[0] < MARGIN * took[0] else forms[0]
        ratios = {form: seconds / relu for form, seconds in zip(forms, took, strict=True)}
        return {"form": chosen, "over_relu": ratios}

    def _kernel(self, form: Form | None, segments: Segments) -> Any:
        """A loop over values in registers; without a form, of ReLU."""
        lanes = self.processor.lanes
        x = te.placeholder((VALUES // lanes, lanes), name="x")
        y = te.compute(
            x.shape, lambda *at: lma(x(*at), form, segments, lanes) if form else te.max(x(*at), 0.0), name="y"
        )
        schedule = s_tir.Schedule(te.create_prim_func([x, y]))
        schedule.vectorize(schedule.get_loops(schedule.get_sblock("y"))[-1])
        return schedule.mod["main"]

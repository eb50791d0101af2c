"""Post-training quantization, as a recipe names it: calibrate, and keep in float what costs too much."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekd.quantize.quantizers import ModelQuantizer, Samples
from edgekd.registry import register

if TYPE_CHECKING:
    from edgekd.quantize.calibration import Method
    from edgekd.quantize.ptq import Prepared


@register("quantizer", "ptq")
class PTQ(ModelQuantizer):
    """INT8 without training: symmetric, weights per channel, ranges from a calibration set.

    calibrate: how a range follows from what was seen; `auto` tries all and keeps what validates best.
    percentile: of the magnitudes, where calibrate is percentile. keep_float: layers that stay in float, by name.
    auto_mixed: look for the fewest layers to keep in float so that budgets.accuracy_drop is met on the validation
    split, or, without a teacher, what the student reaches in float; for at most search_minutes, the best found is used.
    """

    precision = "int8"

    def __init__(
        self,
        *,
        calibrate: Literal["auto", "minmax", "entropy", "percentile"] = "auto",
        percentile: float = 99.99,
        keep_float: list[str] = [],  # noqa: B006
        auto_mixed: bool = False,
        search_minutes: float = 10.0,
    ) -> None:
        self.calibrate, self.percentile, self.keep_float = calibrate, percentile, list(keep_float)
        self.auto_mixed, self.search_minutes = auto_mixed, search_minutes

    def write(self, model: Path, out: Path, samples: Samples) -> dict[str, Any]:
        """Quantize the float model to `out`; returns facts, with `calibrate` and `search`."""
        import onnx

        from edgekd.quantize import mixed, ptq

        prepared = ptq.prepare(model, samples.calibration)
        method, percentile, chosen = self._ranges(prepared, samples)
        keep_float, found = self.keep_float, None
        if self.auto_mixed and samples.target is not None:
            found = mixed.search(
                prepared, samples.images, samples.judge, method=method, percentile=percentile, target=samples.target,
                seconds=60 * self.search_minutes, keep_float=keep_float, on_progress=samples.on_progress,
            )  # fmt: skip
            keep_float = found["keep_float"]
        onnx.save(prepared.quantized(method, percentile, keep_float), str(out))
        return prepared.facts(method, percentile, keep_float) | {"calibrate": chosen, "search": found}

    def _ranges(self, prepared: Prepared, samples: Samples) -> tuple[Method, float, dict[str, Any]]:
        if self.calibrate != "auto":
            given = {
                "method": self.calibrate,
                "percentile": self.percentile if self.calibrate == "percentile" else None,
            }
            return self.calibrate, self.percentile, {**given, "tried": []}
        from edgekd.quantize import ptq

        chosen = ptq.choose(
            prepared, samples.images, samples.judge, keep_float=self.keep_float, on_progress=samples.on_progress
        )
        return chosen["method"], chosen["percentile"] or 100.0, chosen

"""No quantization, by name: a recipe says `method: none`."""

from __future__ import annotations

from edgekd.quantize.quantizers import Quantizer
from edgekd.registry import register


@register("quantizer", "none")
class Unquantized(Quantizer):
    """The student stays in float32."""

    precision = "fp32"

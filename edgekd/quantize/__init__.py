"""INT8 for every runtime from one calibration, and an account of what it cost."""

from edgekd.quantize.dialects import onnxruntime_from_int8, uint8_from_int8
from edgekd.quantize.graph import LMA_MARK
from edgekd.quantize.mixed import search
from edgekd.quantize.ptq import CANDIDATES, METHODS, Prepared, choose, layer_names, prepare, quantize

__all__ = [
    "CANDIDATES", "LMA_MARK", "METHODS", "Prepared", "choose", "layer_names", "onnxruntime_from_int8", "prepare",
    "quantize", "search", "uint8_from_int8",
]  # fmt: skip

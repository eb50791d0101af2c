"""Activations, their learned curves and the ONNX forms of the multi-segment one."""

from edgekd.activations.curves import curves, input_histograms
from edgekd.activations.forms import FORMS, FrozenLMA, default_form, frozen
from edgekd.activations.function import add_function
from edgekd.activations.lma import LMA, freeze_statistics, multi_segment_layers

__all__ = [
    "FORMS",
    "LMA",
    "FrozenLMA",
    "add_function",
    "curves",
    "default_form",
    "freeze_statistics",
    "frozen",
    "input_histograms",
    "multi_segment_layers",
]

"""Networks: made by name, their activations swapped, their weights stored and loaded, their size counted."""

from edgekd.networks.activation_swap import SwapReport, swap_activations
from edgekd.networks.building import build
from edgekd.networks.counts import count_macs, count_params
from edgekd.networks.weights import load_weights, read_weights, save_weights

__all__ = [
    "SwapReport",
    "build",
    "count_macs",
    "count_params",
    "load_weights",
    "read_weights",
    "save_weights",
    "swap_activations",
]

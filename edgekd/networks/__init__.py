"""Networks: made by name, their activations swapped, their weights stored and loaded, their size counted."""

from edgekd.networks.activation_swap import SwapReport, swap_activations
from edgekd.networks.building import build, build_chosen, is_trained
from edgekd.networks.classifier import class_angles
from edgekd.networks.counts import count_macs, count_params
from edgekd.networks.ensemble import Ensemble, member_paths
from edgekd.networks.slimming import Structure, restructure, shrink
from edgekd.networks.spread import Spread
from edgekd.networks.weights import load_weights, read_weights, save_weights

__all__ = [
    "Ensemble",
    "Spread",
    "Structure",
    "SwapReport",
    "build",
    "build_chosen",
    "class_angles",
    "count_macs",
    "count_params",
    "is_trained",
    "load_weights",
    "member_paths",
    "read_weights",
    "restructure",
    "save_weights",
    "shrink",
    "swap_activations",
]

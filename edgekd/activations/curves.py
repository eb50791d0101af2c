"""The learned curves and what flows into them, as plain numbers for the report."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.activations.lma import multi_segment_layers

_RANGE = 4.0  # standard deviations on each side of the mean that are shown


def curves(network: nn.Module) -> list[dict[str, Any]]:
    """The curve of every LMA layer at test time.

    Each is a dict of floats and lists, ready for JSON: name, kind, k, continuous, mu, sigma (the moving average), cuts
    [k - 1], slopes [k], biases [k], max_jump (the largest step of y at a cut), x and y: 65 samples over mu +- 4 sigma
    and both sides of each cut, in order of x.
    """
    found = []
    for name, layer in multi_segment_layers(network):
        cuts, slopes, biases = (values.detach().cpu().double() for values in layer.segments())
        mu, sigma = layer.running.double().tolist()
        right = torch.nextafter(cuts, cuts.new_full((), torch.inf))  # a cut itself belongs to the left segment
        grid = torch.linspace(mu - _RANGE * sigma, mu + _RANGE * sigma, 65, dtype=torch.float64)
        x = torch.cat((grid, cuts, right)).sort().values
        index = torch.bucketize(x, cuts)
        jumps = slopes.diff() * cuts + biases.diff()
        found.append({
            "name": name, "kind": "lma", "k": layer.k, "continuous": layer.continuous, "mu": mu, "sigma": sigma,
            "cuts": cuts.tolist(), "slopes": slopes.tolist(), "biases": biases.tolist(),
            "max_jump": jumps.abs().max().item(), "x": x.tolist(), "y": (slopes[index] * x + biases[index]).tolist(),
        })  # fmt: skip
    return found


@torch.no_grad()
def input_histograms(network: nn.Module, x: Tensor, bins: int = 64) -> list[dict[str, Any]]:
    """What reaches every LMA layer in eval mode when the network is given `x` [B, C, H, W].

    Each is a dict ready for JSON: name, low, high (mu -+ 4 sigma of the layer), counts [bins] between them, and how
    many values lie below and above. The network is left as it was.
    """
    histograms: dict[str, dict[str, Any]] = {}

    def watch(name: str, mu: float, sigma: float) -> Any:
        low, high = mu - _RANGE * sigma, mu + _RANGE * sigma
        row = histograms[name] = {"name": name, "low": low, "high": high, "counts": [0] * bins, "below": 0, "above": 0}

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].float()
            counts = torch.histc(values, bins, low, high).long().tolist()
            row["counts"] = [old + new for old, new in zip(row["counts"], counts, strict=True)]
            row["below"] += int((values < low).sum())
            row["above"] += int((values > high).sum())

        return hook

    modes = {module: module.training for module in network.modules()}
    hooks = [
        layer.register_forward_pre_hook(watch(name, *layer.running.tolist()))
        for name, layer in multi_segment_layers(network)
    ]
    try:
        network.eval()(x)
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes.items():
            module.training = training
    return list(histograms.values())

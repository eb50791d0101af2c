"""What the networks of this package share: scaled channel counts, input checks and He initialisation."""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.errors import RecipeError

WIDEST = 64.0


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded, at least 1. Raises RecipeError for a width that makes no network."""
    check_width(width)
    return max(1, round(channels * width))


def check_width(width: float) -> None:
    """Raise RecipeError for a width that makes no network, or one that no memory holds."""
    if not 0 < width <= WIDEST:
        raise RecipeError(
            f"width = {width} does not make a network",
            allowed=f"allowed: more than 0, at most {WIDEST:g}; 1 is the published width, 0.5 half its channels",
            fix="set width to 1.0",
        )


def conv_bn(
    in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Convolution with 'same' padding and no bias, then batch normalisation. [B,C,H,W] to [B,C',H/stride,W/stride]."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


class GlobalAveragePool(nn.Module):
    """[B,C,H,W] to [B,C], whatever H and W are."""

    def forward(self, x: Tensor) -> Tensor:
        """Mean over both sides of the map."""
        return x.mean((2, 3))


def he_initialise(network: nn.Module) -> None:
    """Weights from N(0, 2 / fan_in), biases 0: He et al., ICCV 2015, eq. 10.

    The last linear layer, which no ReLU follows, gets N(0, 1 / fan_in).
    """
    linears = [module for module in network.modules() if isinstance(module, nn.Linear)]
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | nn.Linear):
            last = bool(linears) and module is linears[-1]
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if last else "relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

"""The networks are those of the papers, and every registered one behaves as a network must."""

from __future__ import annotations

import pytest
import torch
from plain_networks import PLAIN_NETWORKS
from torch import nn

from edgekd.data import Shape
from edgekd.errors import RecipeError
from edgekd.networks import build, count_macs, count_params
from edgekd.networks.mobilenet import divisible, strides_for

CIFAR = Shape(3, 32, 32)
RELU = ("relu", {})


def made(name: str, shape: Shape = CIFAR, num_classes: int = 10, seed: int = 0, **options) -> nn.Module:
    return build(name, options, shape, num_classes, RELU, seed)


def lma_params(kernel: int, convs: list[int], pixels: int, linears: list[int]) -> int:
    """Convolutions and linear layers with biases, a batch normalisation (2 per channel) behind each but the last."""
    channels = [3, *convs]
    total = sum(i * o * kernel**2 + o + 2 * o for i, o in zip(channels, convs, strict=False))
    inputs = [convs[-1] * pixels, *linears]
    return total + sum(i * o + o + 2 * o for i, o in zip(inputs, linears, strict=False)) + linears[-1] * 10 + 10


TEACHER = lma_params(3, [76, 76, 126, 126, 148, 148, 148, 148], 4 * 4, [1200, 1200])
STUDENTS = {
    1: lma_params(5, [75, 50, 50, 25], 8 * 8, [500]),
    2: lma_params(5, [50, 25, 25, 10], 8 * 8, [400]),
    3: lma_params(5, [25, 10, 10, 5], 8 * 8, [300]),
}


def test_lma_networks_have_the_papers_parameter_counts():
    assert count_params(made("lma_teacher")) == TEACHER == 5_346_142
    assert {size: count_params(made("lma_student", size=size)) for size in STUDENTS} == STUDENTS
    assert STUDENTS == {1: 1_000_235, 2: 318_415, 3: 111_935}
    published = [5.35, 1.00, 0.32, 0.11]  # millions
    assert [round(count / 1e6, 2) for count in (TEACHER, *STUDENTS.values())] == published


def resnet_params(n: int, classes: int = 10) -> int:
    def stage(i: int, o: int) -> int:
        return 9 * i * o + (2 * n - 1) * 9 * o * o + 2 * n * 2 * o

    return 9 * 3 * 16 + 2 * 16 + stage(16, 16) + stage(16, 32) + stage(32, 64) + 64 * classes + classes


@pytest.mark.parametrize(
    ("depth", "published"),
    [(8, 0.08), (14, 0.17), (20, 0.27), (26, 0.37), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)],
)
def test_resnet_has_the_papers_parameter_counts(depth, published):
    count = count_params(made("resnet", depth=depth))
    assert count == resnet_params((depth - 2) // 6)
    assert round(count / 1e6, 1 if published > 1 else 2) == published


def test_resnet_20_has_its_known_parameters_and_multiplications():
    assert count_params(made("resnet", depth=20)) == 269_722
    convs = 432 * 32**2 + 6 * 2304 * 32**2 + (4608 + 5 * 9216) * 16**2 + (18432 + 5 * 36864) * 8**2
    assert count_macs(made("resnet", depth=20), CIFAR) == convs + 64 * 10


def wrn_params(n: int, k: int, classes: int) -> int:
    total, i = 9 * 3 * 16, 16
    for o in (16 * k, 32 * k, 64 * k):
        total += 2 * i + 9 * i * o + 2 * o + 9 * o * o + i * o  # norms before both convolutions, 1x1 shortcut
        total += (n - 1) * (2 * (2 * o) + 2 * 9 * o * o)
        i = o
    return total + 2 * i + i * classes + classes


@pytest.mark.parametrize(
    ("depth", "k", "classes", "millions"),
    [(16, 10, 10, 17.1), (16, 10, 100, 17.2), (10, 4, 100, 1.22), (10, 2, 100, 0.32)],
)
def test_wide_resnet_has_the_papers_parameter_counts(depth, k, classes, millions):
    count = count_params(made("wrn", num_classes=classes, depth=depth, k=k))
    assert count == wrn_params((depth - 4) // 6, k, classes)
    assert round(count / 1e6, 1 if millions > 2 else 2) == millions


def test_mobilenet_v2_has_its_known_parameters_and_multiplications():
    imagenet = Shape(3, 224, 224)
    network = made("mobilenet_v2", imagenet, 1000)
    assert count_params(network) == 3_504_872
    assert round(count_macs(network, imagenet) / 1e6) == 301  # the paper's 300 million


@pytest.mark.parametrize(("pixels", "side"), [(8, 4), (32, 4), (64, 4), (96, 3), (224, 7)])
def test_mobilenet_v2_keeps_a_map_on_small_images(pixels, side):
    shape = Shape(3, pixels, pixels)
    strides = strides_for(shape)
    assert pixels // 2 ** strides.count(2) == side
    maps = made("mobilenet_v2", shape).blocks(torch.zeros(1, 32, pixels // strides[0], pixels // strides[0]))
    assert maps.shape == (1, 320, side, side)
    assert strides[1:] == [1, 2, 2, 2, 1, 2, 1] or pixels < 96


def test_mobilenet_v2_rounds_channels_as_its_authors_did():
    assert [divisible(c, 0.35) for c in (32, 16, 24, 96, 160, 320)] == [16, 8, 8, 32, 56, 112]
    assert [divisible(c, 1.4) for c in (32, 16, 24, 32, 1280)] == [48, 24, 32, 48, 1792]


NETWORKS = PLAIN_NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [Shape(1, 8, 8), Shape(3, 32, 32), Shape(3, 9, 14)], ids=str)
def test_every_network_trains_every_parameter_and_gives_logits(name, shape):
    network = made(name, shape, num_classes=7)
    x = torch.randn(8, shape.channels, shape.height, shape.width, generator=torch.Generator().manual_seed(1))
    logits = network(x)
    assert logits.shape == (8, 7) and logits.dtype == torch.float32
    nn.functional.cross_entropy(logits, torch.arange(8) % 7).backward()
    for key, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any() or parameter.ndim == 1, key


@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_every_network_grows_with_its_width(name):
    shape = Shape(1, 8, 8)
    counts = [count_params(made(name, shape, width=width)) for width in (0.25, 0.5, 1.0, 1.5)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_every_network_depends_on_its_seed_alone(name):
    shape = Shape(1, 8, 8)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, other = made(name, shape, seed=1), made(name, shape, seed=1), made(name, shape, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)]
    assert all(same)
    assert not torch.equal(next(one.parameters()), next(other.parameters()))


@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_every_network_starts_with_he_initialisation(name):
    network = made(name, CIFAR)
    convs = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.weight.numel() > 5000]
    assert convs
    for conv in convs:
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", PLAIN_NETWORKS)
@pytest.mark.parametrize("width", [0.0, -1.0, 1e9])
def test_a_width_that_makes_no_network_is_refused(name, width):
    with pytest.raises(RecipeError) as caught:
        made(name, width=width)
    assert str(caught.value) == (
        f"error: width = {width} does not make a network\n"
        "       allowed: more than 0, at most 64; 1 is the published width, 0.5 half its channels\n"
        "fix:   set width to 1.0"
    )


@pytest.mark.parametrize(("name", "depth", "rule", "fix"), [("resnet", 18, "6n+2", 20), ("wrn", 0, "6n+4", 10)])
def test_a_depth_of_no_such_network_is_refused(name, depth, rule, fix):
    with pytest.raises(RecipeError) as caught:
        made(name, depth=depth)
    text = str(caught.value)
    assert f"depth = {depth} is not the depth of a" in text and rule in text and f"fix:   set depth = {fix}" in text


def test_depths_far_outside_are_refused_with_a_depth_that_exists():
    with pytest.raises(RecipeError, match="depth = -1000000000") as caught:
        made("resnet", depth=-1_000_000_000)
    assert caught.value.fix == "set depth = 8"


def test_wide_resnet_and_mobilenet_refuse_other_options_that_cannot_be():
    with pytest.raises(RecipeError, match=r"k = 0 and dropout = 0\.0"):
        made("wrn", k=0)
    with pytest.raises(RecipeError, match=r"mobilenet_v2 cannot have dropout = 1\.0"):
        made("mobilenet_v2", dropout=1.0)


@pytest.mark.parametrize(("name", "smallest"), [("lma_teacher", 8), ("lma_student", 4)])
def test_lma_networks_name_the_smallest_image_they_take(name, smallest):
    assert made(name, Shape(1, smallest, smallest)) is not None
    with pytest.raises(RecipeError) as caught:
        made(name, Shape(1, 28, smallest - 1))
    assert str(caught.value).splitlines()[0].startswith(f"error: images of 28x{smallest - 1} are too small")
    assert f"allowed: {smallest}x{smallest} pixels or more" in str(caught.value)


def test_counting_leaves_modes_and_statistics_alone():
    network = made("resnet", depth=8)
    network.stages[0].eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    count_macs(network, CIFAR)
    assert modes == [module.training for module in network.modules()]
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

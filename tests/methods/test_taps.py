"""Features come from the forward that gives the logits, the networks stay as they are, and what cannot be is said."""

from __future__ import annotations

import json

import pytest
import torch
from method_pairs import SHAPE, attached, network, pair, setting, step_of, student_of, teacher_of
from plain_networks import PLAIN_NETWORKS
from torch import Tensor, nn

from edgekd import data, distill, networks, registry
from edgekd.data import Dataset, Shape
from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, attachment
from edgekd.methods.features import FeatureMethod
from edgekd.methods.taps import Taps, default_taps
from edgekd.recipe import Augment, Train


class Foreign(nn.Module):
    """A user's network, with a part that is never called and one that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU())
        self.spare = nn.Conv2d(1, 6, 3)
        self.split = Split()
        self.head = nn.Linear(6 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(self.body(x))
        logits: Tensor = self.head((first + second).flatten(1))
        return logits


class Split(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def test_features_come_from_the_forward_of_the_logits_and_once():
    student, teacher = pair()
    calls = []
    for owner, one in (("student", student), ("teacher", teacher)):
        one.stages[1].register_forward_hook(lambda *_, owner=owner: calls.append(owner))
    method = attached("fitnet", student, teacher)
    calls.clear()
    step = step_of(method, student, teacher)
    features = step.student_features, step.teacher_features
    for one, seen in zip((student, teacher), features, strict=True):
        one.eval()
        assert tuple(seen) == ("stages.0", "stages.1", "stages.2")
    method(step)
    assert calls == ["student", "teacher"]
    assert all(feature.requires_grad for feature in features[0].values())
    assert not any(feature.requires_grad for feature in features[1].values())
    teacher.stages[2].register_forward_hook(
        lambda module, inputs, output: torch.testing.assert_close(output, features[1]["stages.2"], rtol=0, atol=0)
    )
    teacher(step.x)
    torch.testing.assert_close(student.fc(student.pool(features[0]["stages.2"])), step.student_logits)


def test_attaching_changes_nothing_in_the_networks():
    student, teacher = pair()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = {name: module.training for name, module in student.named_modules()}
    attached("crd", student, teacher)
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


ZOO = {
    "resnet": ({"depth": 8, "width": 0.25}, ["stages.0", "stages.1", "stages.2"], "pool"),
    "wrn": ({"depth": 10, "k": 1, "width": 0.25}, ["stages.0", "stages.1", "stages.2"], "pool"),
    "mobilenet_v2": ({"width": 0.25}, None, "pool"),
    "lma_student": ({"width": 0.2}, ["features.6", "features.14"], "classifier.3"),
    "lma_teacher": ({"width": 0.05}, ["features.6", "features.14", "features.28"], "classifier.7"),
}


@pytest.mark.parametrize("activation", ["relu", "lma"])
@pytest.mark.parametrize("name", PLAIN_NETWORKS)
def test_edgekds_own_networks_need_no_taps_named(name, activation):
    options, maps, embedding = ZOO[name]
    one = networks.build(name, options, Shape(1, 16, 16), 10, (activation, {}), 0)
    x = torch.randn(2, 1, 16, 16)
    for place, expected in (("maps", maps), ("embedding", [embedding])):
        paths = default_taps(one, place, "student")
        assert expected is None or paths == expected
        features = Taps(one, paths, "student").probe(one, x)
        dimensions = {feature.ndim for feature in features.values()}
        assert dimensions == ({4} if place == "maps" else {2})
        sides = [feature.shape[2] for feature in features.values()] if place == "maps" else []
        assert sides == sorted(set(sides), reverse=True)  # one for every size


def test_the_deepest_stages_are_paired_when_one_network_has_fewer():
    shape = Shape(1, 8, 8)
    student = networks.build("lma_student", {"width": 0.2}, shape, 5, ("relu", {}), 0)
    teacher = networks.build("lma_teacher", {"width": 0.05}, shape, 5, ("relu", {}), 0)
    method = attached("fitnet", student, teacher)
    assert method.student_taps.paths == ("features.6", "features.14")
    assert method.teacher_taps.paths == ("features.14", "features.28")
    assert method(step_of(method, student, teacher))["hint"] > 0


def problem(**options) -> list[str]:
    student, teacher = pair()
    student = options.pop("student", student)
    with pytest.raises(RecipeError) as caught:
        attached(options.pop("name", "fitnet"), student, teacher, **options)
    assert caught.value.key.startswith("distill.")
    return str(caught.value).splitlines()


def test_a_tap_that_does_not_exist():
    lines = problem(student_taps=["stages.4"], teacher_taps=["stages.1"])
    assert lines[0] == 'error: distill.student_taps = "stages.4" is not a known module of the student'
    assert lines[1].startswith("       known: fc, pool, stages, stages.0, stages.0.0, ")
    assert lines[1].endswith('(closest: "stages.2")') or '(closest: "stages.' in lines[1]
    assert lines[2].startswith('fix:   write "stages.') and " in distill.student_taps, or name modules" in lines[2]
    assert problem(student_taps=["?"], teacher_taps=["stages.1"])[2] == "fix:   name modules that it has"


def test_taps_that_cannot_be_paired():
    assert problem(student_taps=["stages.0", "stages.1"], teacher_taps=["stages.1"]) == [
        "error: 2 student_taps cannot be paired with 1 teacher_taps",
        "       student: stages.0, stages.1; teacher: stages.1",
        "fix:   name as many of the one as of the other, in the order of their pairs",
    ]


def test_a_network_that_is_not_edgekds_own():
    assert problem(student=Foreign()) == [
        "error: where the student has its maps is not known, and distill.student_taps does not say it",
        "       its modules: body, spare, split, head, and those inside of them",
        "fix:   name modules: --set 'distill.student_taps=[PATH, ...]'",
    ]
    student, teacher = Foreign(), network(0.25, 1).eval()
    method = attached("fitnet", student, teacher, student_taps=["body"], teacher_taps=["stages.1"])
    assert method.adapters[0][0].weight.shape == (8, 6, 1, 1)


def test_a_tap_that_the_logits_do_not_need():
    assert problem(student=Foreign(), student_taps=["spare"], teacher_taps=["stages.1"]) == [
        'error: distill.student_taps: "spare" is not used by the student\'s forward',
        "       a tap is a module that is called on the way from the images to the logits",
        "fix:   tap a module before or after it, or one that holds it",
    ]


def test_a_tap_that_gives_no_tensor():
    assert problem(student=Foreign(), student_taps=["split"], teacher_taps=["stages.1"]) == [
        'error: distill.student_taps: "split" gives tuple, not a tensor',
        "       a tap is a module whose forward returns one tensor",
        "fix:   tap a module inside of it",
    ]


def test_a_map_is_wanted_and_a_vector_is_tapped():
    assert problem(student_taps=["fc"], teacher_taps=["stages.1"]) == [
        'error: distill.student_taps: "fc" gives [2, 5] for 2 images',
        "       expected: a feature map [B, C, H, W]",
        "fix:   tap a convolutional part of the network",
    ]


def test_a_unet_has_no_embedding_and_a_volume_no_maps():
    unet = networks.build("unet", {"channels": 4}, Shape(1, 8, 8), 2, ("relu", {}), 0, maps=(8, 8))
    with pytest.raises(RecipeError, match="where the student has its embedding is not known"):
        default_taps(unet, "embedding", "student")
    with pytest.raises(RecipeError) as caught:
        FeatureMethod(None, None)._size(torch.zeros(2, 4, 8, 8, 8), "encoder.0", "student")
    assert str(caught.value).splitlines()[1:] == [
        "       expected: a feature map [B, C, H, W]",
        "fix:   set distill.method = kd for volumes",
    ]


def test_crd_takes_one_embedding_and_two_classes():
    assert problem(name="crd", student_taps=["pool", "fc"], teacher_taps=["pool", "fc"]) == [
        "error: crd compares one embedding of each network, and 2 are tapped: pool, fc",
        "       expected: one module path",
        "fix:   name one in distill.student_taps and one in distill.teacher_taps",
    ]
    method = registry.create("method", "crd")
    one_class = setting()
    one_class.labels.zero_()
    with pytest.raises(RecipeError) as caught:
        method.attach(*pair(), one_class)
    assert str(caught.value) == (
        "error: crd needs samples of two classes, and all training samples are of one\n"
        "       negative pairs are samples of different classes\n"
        "fix:   give data with two classes or more, or use distill.method = kd"
    )


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return data.load("digits", {}, train_limit=40, test_limit=20)


def trained(digits: Dataset, work, name: str, student: nn.Module, teacher: nn.Module | None, **train) -> str:
    spec = Train(**{"epochs": 1, "batch_size": 12, **train})
    with pytest.raises(RecipeError) as caught:
        distill.train(
            student, digits, spec, registry.create("method", name), teacher=teacher, augment=Augment(crop=1), seed=0,
            work=work,
        )  # fmt: skip
    return str(caught.value)


def ten(width: float = 0.25, shape: Shape = SHAPE, classes: int = 10) -> nn.Module:
    return networks.build("resnet", {"depth": 8, "width": width}, shape, classes, ("relu", {}), 0)


def test_a_teacher_of_other_classes(digits, tmp_path):
    expected = (
        "error: the teacher gives [12, 7] for 12 images, and the data asks for [12, 10]\n"
        "       expected: logits [12, 10] of teacher and student alike\n"
        "fix:   use a teacher that was made for these classes"
    )
    assert trained(digits, tmp_path, "kd", ten(), ten(classes=7)) == expected
    assert trained(digits, tmp_path, "fitnet", ten(), ten(classes=7)) == expected
    assert trained(digits, tmp_path, "kd", ten(classes=7), ten()) == expected.replace("teacher gives", "student gives"
        ).replace("use a teacher", "use a student")  # fmt: skip


@pytest.mark.parametrize("name", ["kd", "fitnet"])
def test_a_teacher_for_other_images(name, digits, tmp_path):
    lines = trained(digits, tmp_path, name, ten(), ten(shape=Shape(3, 8, 8))).splitlines()
    assert lines[0].startswith(
        "error: the teacher fails on images of 1x8x8: Given groups=1, weight of size [4, 3, 3, 3]"
    )
    assert lines[1:] == [
        "       expected: teacher and student that take the same images, those of the data",
        "fix:   use a teacher that was made for images of this size",
    ]


def test_a_method_that_needs_a_teacher_without_one(digits, tmp_path):
    assert trained(digits, tmp_path, "kd", ten(), None) == (
        "error: distill needs a teacher for kd, and there is none\n"
        "       methods for classification without a teacher: angular, online_peers, scratch\n"
        "fix:   name a teacher: --set teacher.network=NAME, or --set distill.method=scratch"
    )


def test_taps_and_compilation(digits, tmp_path):
    assert trained(digits, tmp_path, "rkd", ten(), ten(), compile=True) == (
        "error: train.compile = true cannot be combined with a method that taps features of the student\n"
        "       the compiled network does not call the modules that are tapped: pool\n"
        "fix:   set distill.train.compile = false"
    )


def test_adapters_need_two_samples_too(digits, tmp_path):
    from edgekd.errors import StageError

    plain = nn.Sequential(nn.Conv2d(1, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 10))
    method = registry.create("method", "fitnet", options={"student_taps": ["1"], "teacher_taps": ["stages.1"]})
    with pytest.raises(StageError, match="learns nothing from a batch of one sample"):
        distill.train(
            plain, digits, Train(epochs=1, batch_size=1), method, teacher=ten(), augment=Augment(), seed=0,
            work=tmp_path,
        )  # fmt: skip


def test_stages_and_combinations_that_make_no_sense(digits, tmp_path):
    def message(name: str, **options) -> str:
        with pytest.raises(RecipeError) as caught:
            registry.create("method", name, options=options, where="distill").attach(*pair(), setting(epochs=5))
        return str(caught.value)

    assert message("combined", methods=["kdd"]).startswith(
        'error: distill.methods = "kdd" is not a known method\n       known: '
    )
    assert message("combined", methods=[{"kd": {"temprature": 3}}]).startswith(
        "error: distill.methods.kd.temprature is not a known key or option of method kd\n"
    )
    assert message("combined", methods=[{"kd": {}, "rkd": {}}]) == (
        'error: distill.methods.0 = {"kd": {}, "rkd": {}} is not valid\n'
        "       expected: list of method   (NAME, or {NAME: {option: value}})\n"
        "fix:   correct distill.methods.0, or see: edgekd list methods"
    )
    assert message("combined", methods=[]) == (
        "error: distill.methods is empty\n"
        "       expected: one method or more, NAME or {NAME: {option: value}}\n"
        "fix:   --set 'distill.methods=[kd]'"
    )
    assert message("combined", methods=["kd", "rkd", "regression"]) == (
        "error: distill.methods have no task in common: kd learns classification or segmentation, rkd learns any,"
        " regression learns regression\n"
        "       expected: methods that can all learn what the data asks for\n"
        "fix:   leave out those that are for other tasks"
    )
    assert message("combined", methods=["rkd", {"kd": {"temperature": 0}}]) == (
        "error: distill.methods.kd.temperature = 0.0 is not valid\n"
        "       expected: above 0\n"
        "fix:   write distill.methods.kd.temperature: 4 in the recipe"
    )
    assert message("combined", methods=["kd", {"kd": {"kd_weight": 2}}]).splitlines()[2] == (
        "fix:   write distill.methods.kd.kd_weight: 0.7 in the recipe, or give distill.methods.kd.ce_weight"
    )
    assert message(
        "staged", methods=["kd", {"online_peers": {"student_taps": ["stages.0", "pool"]}}], epochs=[2, 3]
    ) == (
        "error: distill.methods.online_peers.student_taps names 2 modules, and the method taps one\n"
        "       expected: the path of the module whose output is the embedding\n"
        "fix:   name one in distill.methods.online_peers.student_taps, or leave it out"
    )
    assert message("staged", methods=["kd", "rkd"], epochs=[5]) == (
        "error: distill.epochs = [5] does not fit 2 methods\n"
        "       expected: a number of epochs, at least 1, for each method\n"
        "fix:   --set 'distill.epochs=[1, 1]', and so on"
    )
    assert message("staged", methods=["kd", "rkd"], epochs=[1, 2]) == (
        "error: distill.epochs = [1, 2] are 3 epochs, and distill.train has 5\n"
        "       expected: the same sum\n"
        "fix:   --set distill.train.epochs=3"
    )


@pytest.mark.parametrize(
    ("name", "option", "value", "allowed", "example"),
    [
        ("dkd", "temperature", {"linear": [4.0, 0.0]}, "above 0", 4),
        ("dkd", "beta", {"step": [1.0, -1.0]}, "at least 0", 1),
        ("fitnet", "weight", -1.0, "at least 0", 1),
        ("scratch", "label_smoothing", {"linear": [0.1, 1.5]}, "a share, at least 0 and below 1", 0.1),
        ("crd", "momentum", 1.0, "a share, at least 0 and below 1", 0.5),
        ("kd", "confidence", 50.0, "from 0 to 1", 0.5),
        ("spread", "kd_weight", 1.5, "from 0 to 1", 0.9),
        ("robust_prune", "kd_weight", {"linear": [0.5, 1.5]}, "from 0 to 1", 0.7),
        ("decorrelated_prune", "kd_weight", 1.5, "from 0 to 1", 0.7),
        ("domain_kd", "beta", {"step": [0.5, 2.0]}, "from 0 to 1", 0.3),
        ("domain_kd", "alpha", -0.5, "from 0 to 1", 0.3),
    ],
)
def test_bounds_hold_for_every_value_of_a_schedule(name, option, value, allowed, example):
    with pytest.raises(RecipeError) as caught:
        registry.create("method", name, options={option: value})
    assert str(caught.value) == (
        f"error: distill.{option} = {json.dumps(value)} is not valid\n"
        f"       expected: {allowed}\n"
        f"fix:   --set distill.{option}={example}"
    )


@pytest.mark.parametrize(
    ("name", "option"), [("online_peers", "student_taps"), ("domain_kd", "teacher_taps"), ("spread", "teacher_taps")]
)
@pytest.mark.parametrize("paths", [[], ["stages.0", "pool"]])
def test_a_method_that_taps_one_module_is_given_none_or_two(name, option, paths):
    with pytest.raises(RecipeError) as caught:
        attached(name, student_of(name), teacher_of(name), **{option: paths})
    assert str(caught.value) == (
        f"error: distill.{option} names {len(paths)} modules, and the method taps one\n"
        "       expected: the path of the module whose output is the embedding\n"
        f"fix:   name one in distill.{option}, or leave it out"
    )


def test_images_for_a_method_come_from_all_over_the_split(digits):
    """Folders are read class by class: the first ones would be of one class."""
    seen = []

    class Looking(Method):
        needs_teacher = False

        def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
            seen.append(setting.images(4))
            seen.append(setting.images(10_000))

    attachment.attach(Looking(), ten(), None, digits, Train())
    images = digits.normalized("train")
    last = len(images) - 1
    few = [0, round(last / 3), round(last * 2 / 3), last]
    assert torch.equal(seen[0], torch.from_numpy(images[few]))
    assert torch.equal(seen[1], torch.from_numpy(images))


def test_taps_are_checked_before_the_teacher_is_trained(main, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "name: taps\n"
        "data: {source: digits, train_limit: 60, test_limit: 20}\n"
        "teacher: {network: resnet, depth: 8, width: 0.25}\n"
        "student: {network: resnet, depth: 8, width: 0.25}\n"
        "distill:\n"
        "  method: fitnet\n"
        "  student_taps: [stages.1]\n"
        "  teacher_taps: [stages.9]\n"
    )
    code, out, err = main("distill", tmp_path / "recipe.yaml", "--store", tmp_path / "store")
    assert (code, out) == (2, "")
    assert 'recipe.yaml:8: distill.teacher_taps = "stages.9" is not a known module of the teacher' in err
    assert not list((tmp_path / "store").rglob("manifest.json"))

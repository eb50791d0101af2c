"""Trained networks as one: its logits, its errors, and what of its members is in the keys of a store."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_job import TINY, make_job
from torch import nn

from edgekd import networks, pipeline
from edgekd.data import Shape
from edgekd.errors import CheckpointError, RecipeError
from edgekd.methods.taps import default_taps

SHAPE = Shape(1, 8, 8)


def member_of(seed: int, options: dict, activation=("relu", {})) -> nn.Module:
    return networks.build("resnet", {"depth": 8, **options}, SHAPE, 10, activation, seed).eval()


@pytest.fixture
def files(tmp_path) -> list[Path]:
    """The weights of two networks."""
    found = [tmp_path / "narrow.safetensors", tmp_path / "wide.safetensors"]
    networks.save_weights(member_of(1, {"width": 0.25}), found[0])
    networks.save_weights(member_of(2, {"width": 0.375}, ("lma", {})), found[1])
    return found


def members(files: list[Path]) -> list[dict]:
    return [
        {"network": "resnet", "depth": 8, "width": 0.25, "checkpoint": str(files[0])},
        {"network": "resnet", "depth": 8, "width": 0.375, "activation": "lma", "checkpoint": str(files[1])},
    ]


def build(chosen: list, activation: str = "relu", **options) -> nn.Module:
    return networks.build("ensemble", {"members": chosen, **options}, SHAPE, 10, (activation, {}), 0).eval()


def test_the_logits_are_a_mean(files):
    x = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    alone = [member_of(1, {"width": 0.25}), member_of(2, {"width": 0.375}, ("lma", {}))]
    z = np.stack([one(x).detach().double().numpy() for one in alone])
    np.testing.assert_allclose(build(members(files))(x).detach().numpy(), z.mean(0), rtol=1e-4, atol=1e-5)
    p = np.exp(z) / np.exp(z).sum(2, keepdims=True)
    logits = build(members(files), mean="probabilities")(x).detach()
    np.testing.assert_allclose(logits.softmax(1).numpy(), p.mean(0), rtol=1e-4, atol=1e-5)


def test_members_are_found_and_tapped(files):
    teacher = build(members(files))
    assert networks.member_paths(teacher) == ["members.0", "members.1"]
    assert networks.member_paths(teacher.members[0]) == []
    assert default_taps(teacher, "embedding", "teacher") == ["members.0.pool"]
    assert networks.is_trained(teacher) and not networks.is_trained(teacher.members[0])


def problem(chosen: list, **options) -> str:
    with pytest.raises(RecipeError) as caught:
        build(chosen, **options)
    return str(caught.value)


def test_what_makes_no_ensemble(files):
    one, two = members(files)
    assert problem([one]) == (
        "error: an ensemble of 1 is none\n"
        "       expected: two members or more, each {network: NAME, checkpoint: FILE, its options}\n"
        "fix:   add members, or name the one network itself"
    )
    assert problem([one, "resnet"]) == (
        'error: member 1 of the ensemble, "resnet", has no checkpoint\n'
        "       an ensemble is made of networks that are trained already\n"
        "fix:   train it by a recipe of its own: .edgekd/store/teacher/*/weights.safetensors is its checkpoint"
    )
    assert problem([one, two], activation="lma") == (
        "error: network \"ensemble\" is trained already, and activation 'lma' would change it\n"
        "       its members have activations of their own: {network: NAME, activation: NAME, checkpoint: FILE}\n"
        "fix:   give the activation to its members"
    )


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"network": "resne"}, 'error: network = "resne" is not a known network\n'),
        ({"network": "resnet", "dept": 8}, "error: network resnet.dept is not a known key or option"),
        (
            {"depth": 8},
            'error: network.members.1 = {"depth": 8} is not valid\n       expected: list of network   (NAME,',
        ),
        ({"network": "resnet", "activation": "lmaa"}, 'error: activation = "lmaa" is not a known activation\n'),
        ({"network": "resnet", "activation": 3}, "error: network.members.1 = "),
        ({"network": "resnet", "checkpoint": 3}, "error: network.members.1 = "),
    ],
)
def test_members_are_checked_like_the_teacher(files, chosen, message):
    assert problem([members(files)[0], chosen]).startswith(message)


def test_a_member_that_does_not_fit(files):
    one, two = members(files)
    with pytest.raises(CheckpointError, match="does not fit the network"):
        build([one, {**two, "width": 0.5}])


def recipe(files: list[Path]) -> str:
    lines = [
        f"    - {{network: resnet, depth: 8, width: 0.25, checkpoint: {files[0]}}}",
        f"    - {{network: resnet, depth: 8, width: 0.375, activation: lma, checkpoint: {files[1]}}}",
    ]
    teacher = "  network: ensemble\n  members:\n" + "\n".join(lines) + "\n"
    return TINY.replace("  network: resnet\n  depth: 8\n  width: 0.25\n  train: {epochs: 1}\n", teacher, 1)


def test_the_weights_of_members_are_in_the_keys_and_their_paths_are_not(files, tmp_path):
    store = tmp_path / "store"
    made = pipeline.run(make_job(store, recipe=recipe(files)), "student")
    assert "epochs" not in made["teacher"].result  # it was not trained
    moved = [Path(shutil.copy(file, tmp_path / f"moved-{number}.safetensors")) for number, file in enumerate(files)]
    again = pipeline.run(make_job(store, recipe=recipe(moved)), "student")
    assert [again[name].key for name in again] == [made[name].key for name in made]
    assert str(tmp_path) not in made["teacher"].file("weights.safetensors").read_bytes().decode("latin-1")
    networks.save_weights(member_of(3, {"width": 0.25}), moved[0])
    planned = {one.stage: one.action for one in pipeline.plan(make_job(store, recipe=recipe(moved)), "student")}
    assert planned == {"teacher": "run", "scratch": "reuse", "student": "unknown"}
    moved[0].unlink()
    with pytest.raises(CheckpointError) as caught:
        pipeline.plan(make_job(store, recipe=recipe(moved)), "student")
    assert str(caught.value) == (
        f"error: {moved[0]}: there is no such file\n       a file that the recipe names\nfix:   correct its path"
    )

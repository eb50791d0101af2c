"""Weights survive the disk; what is damaged, dangerous or does not fit is refused and leaves the network alone."""

from __future__ import annotations

import os
import pickle
import stat

import pytest
import safetensors.torch
import torch
from plain_networks import PLAIN_NETWORKS
from torch import nn

from edgekd.data import Shape
from edgekd.errors import CheckpointError
from edgekd.networks import build, load_weights, read_weights, save_weights

SHAPE = Shape(1, 8, 8)


def small(seed=0, **options) -> nn.Module:
    return build("resnet", {"depth": 8, "width": 0.25, **options}, SHAPE, 10, ("relu", {}), seed)


def equal(one: nn.Module, two: nn.Module) -> bool:
    left, right = one.state_dict(), two.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def refused(path, network=None) -> str:
    """The error of loading `path`, after which the network must be as it was."""
    network = network or small()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_weights(network, path)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    text = str(caught.value)
    assert str(path) in text and "\nfix:   " in text
    return text


@pytest.mark.parametrize("name", PLAIN_NETWORKS)
@pytest.mark.parametrize("activation", ["relu", "lma", "aplu"])
def test_every_network_comes_back_with_its_facts(name, activation, tmp_path):
    facts = {
        "network": name,
        "options": {"width": 0.5},
        "shape": [1, 8, 8],
        "num_classes": 10,
        "activation": activation,
    }
    one, two = (build(name, {"width": 0.5}, SHAPE, 10, (activation, {}), seed) for seed in (1, 2))
    one.train()(torch.randn(4, 1, 8, 8))  # moves the statistics, which must come back too
    save_weights(one, tmp_path / "weights.safetensors", facts)
    assert load_weights(two, tmp_path / "weights.safetensors") == facts
    assert equal(one, two)


def test_tied_and_channels_last_weights_are_saved(tmp_path):
    def tied():
        network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
        network[1].weight = network[0].weight
        return network

    one, two = tied(), tied()
    save_weights(one, tmp_path / "w.safetensors")
    assert load_weights(two, tmp_path / "w.safetensors") == {} and equal(one, two)
    assert two[0].weight is two[1].weight


def test_metadata_of_other_programs_is_text(tmp_path):
    safetensors.torch.save_file(small().state_dict(), tmp_path / "w.safetensors", {"format": "pt", "step": "3"})
    assert read_weights(tmp_path / "w.safetensors")[1] == {"format": "pt", "step": "3"}


def test_the_same_weights_are_the_same_bytes(tmp_path):
    facts = {name: name for name in ("network", "options", "activation", "shape", "classes")}
    for number in range(8):
        save_weights(small(1), tmp_path / f"{number}.safetensors", facts)
    assert len({(tmp_path / f"{number}.safetensors").read_bytes() for number in range(8)}) == 1


@pytest.mark.parametrize("wrap", [
    lambda state: state,
    lambda state: {"state_dict": state, "epoch": 3},
    lambda state: {"model": {"state_dict": state}},
    lambda state: {f"module.{key}": value for key, value in state.items()},
    lambda state: {"model_state_dict": {f"_orig_mod.module.{key}": value for key, value in state.items()}},
    lambda state: {key: value.double() if value.is_floating_point() else value for key, value in state.items()},
])  # fmt: skip
def test_torch_state_dicts_of_training_scripts_are_read(wrap, tmp_path):
    one, two = small(1), small(2)
    torch.save(wrap(one.state_dict()), tmp_path / "w.pth")
    assert load_weights(two, tmp_path / "w.pth") == {} and equal(one, two)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_code_is_refused_and_not_run(save, tmp_path):
    save({"state_dict": small().state_dict(), "extra": Evil(tmp_path / "owned")}, tmp_path / "w.pt")
    text = refused(tmp_path / "w.pt")
    assert not (tmp_path / "owned").exists()
    assert "holds more than weights: loading it would run the code in it, which edgekd never does" in text
    assert "allowed: .safetensors, or a state dict saved by torch.save(network.state_dict(), path)" in text


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
    assert "holds more than weights" in refused(tmp_path / "w.pt")


def test_a_checkpoint_that_does_not_fit_names_the_first_tensors(tmp_path):
    save_weights(small(width=0.5), tmp_path / "w.safetensors")
    text = refused(tmp_path / "w.safetensors")
    keys = small().state_dict().keys()
    other = [key for key in keys if key != "fc.bias" and not key.endswith("num_batches_tracked")]
    assert f"does not fit the network in {len(other)} of {len(keys)} tensors" in text
    assert "stem.0.weight: 8x1x3x3 in the file, 4x1x3x3 in the network" in text
    assert f"; and {len(other) - 4} more" in text


def test_missing_and_additional_tensors_are_named(tmp_path):
    state = small().state_dict()
    del state["fc.bias"]
    torch.save({**state, "head.weight": torch.zeros(2)}, tmp_path / "w.pt")
    text = refused(tmp_path / "w.pt")
    assert "fc.bias: missing in the file; head.weight: not in the network" in text and "more" not in text


def test_weights_with_nan_are_refused(tmp_path):
    network = small()
    with torch.no_grad():
        network.fc.bias[3] = float("nan")
    save_weights(network, tmp_path / "w.safetensors")
    text = refused(tmp_path / "w.safetensors")
    assert "the weights hold NaN in 1 tensors" in text and "fc.bias" in text


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_damaged(suffix, keep, tmp_path):
    path = tmp_path / f"w.{suffix}"
    save_weights(small(), path) if suffix == "safetensors" else torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "is damaged, or is no checkpoint" in refused(path)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("content", [b"hello", b"\x00" * 64, b"\x80\x02]q\x00.", b"\xff" * 200, b"PK\x03\x04rest"])
def test_a_file_of_something_else_is_refused(suffix, content, tmp_path):
    (tmp_path / f"w.{suffix}").write_bytes(content)
    refused(tmp_path / f"w.{suffix}")


@pytest.mark.parametrize("content", [3, [torch.zeros(2)], {}, {"state_dict": {}}, {"a": 1}, torch.zeros(3)])
def test_a_torch_file_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "w.pt")
    assert "holds no state dict but" in refused(tmp_path / "w.pt")


def test_absent_files_and_folders_are_refused(tmp_path):
    assert "there is no such checkpoint file" in refused(tmp_path / "none.safetensors")
    assert "there is no such checkpoint file" in refused(tmp_path)


def test_saving_is_all_or_nothing(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(small(1), path)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(CheckpointError) as caught:
        save_weights(small(2), tmp_path / "nowhere" / "w.safetensors")
    assert "cannot write the weights: No such file or directory" in str(caught.value)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="cannot write the weights"):
        save_weights(small(2), path)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_full_disk_leaves_the_old_weights(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(small(1), path)
    resource = pytest.importorskip("resource")
    import signal

    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot write the weights: File too large"):
            save_weights(small(2), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    again = small(3)
    load_weights(again, path)
    assert equal(again, small(1)) and [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]

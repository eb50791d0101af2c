"""A student that was pruned is smaller in every stage below it: real ones, on the cheapest job."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from tiny_job import make_job

from edgekd import networks, pipeline, stages
from edgekd.artifact import Artifact
from edgekd.data import Shape
from edgekd.errors import CheckpointError

OPTIONS = ("distill.method=robust_prune", "distill.sparsity=0.5", "distill.steps=1", "distill.debias=0.4",
           "quantize.method=ptq", "distill.scratch=false", "distill.train.lr=0.01")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("pruned") / "store"


@pytest.fixture(scope="module")
def artifacts(store) -> dict[str, Artifact]:
    return pipeline.run(make_job(store, *OPTIONS), "engine-student")


def whole():
    return networks.build("resnet", {"depth": 8, "width": 0.25}, Shape(1, 8, 8), 10, ("lma", {}), 0)


def test_the_students_numbers_are_those_of_the_smaller_network(artifacts):
    result, network = artifacts["student"].result, whole()
    before = networks.count_params(network), networks.count_macs(network, Shape(1, 8, 8))
    networks.load_weights(network, artifacts["student"].file(stages.WEIGHTS))
    assert result["params"] == networks.count_params(network) < 0.7 * before[0]
    assert result["macs"] == networks.count_macs(network, Shape(1, 8, 8)) < 0.75 * before[1]
    (note,) = [note for note in result["notes"] if "not needed" in note]
    assert f"{result['params']:,} of {before[0]:,} parameters are left" in note


def test_it_is_restored_and_exported_as_it_is(store, artifacts):
    job = make_job(store, *OPTIONS)
    network = job.restore("student", artifacts["student"])
    images = torch.from_numpy(job.images(0, 50))
    logits = np.load(artifacts["student"].file(stages.LOGITS))
    np.testing.assert_allclose(network(images).detach().numpy(), logits, atol=1e-4)
    assert artifacts["onnx-student"].result["parity"]["unexplained"] == 0
    weights = onnx.load(artifacts["onnx-student"].file(stages.MODEL)).graph.initializer
    assert sum(int(np.prod(weight.dims)) for weight in weights) < 0.7 * networks.count_params(whole())
    assert 0 <= artifacts["quantize"].result["score"] <= 1 and artifacts["engine-student"].result


def test_it_can_be_a_teacher(artifacts, tmp_path):
    checkpoint = f"teacher.checkpoint={artifacts['student'].file(stages.WEIGHTS)}"
    made = pipeline.run(make_job(tmp_path / "store", checkpoint, "teacher.activation=lma"), "teacher")["teacher"]
    assert made.result["params"] == artifacts["student"].result["params"]
    assert made.result["score"] == artifacts["student"].result["score"]
    make_job(tmp_path / "store", checkpoint, "teacher.activation=lma").restore("teacher", made)


def test_its_weights_in_another_network(artifacts):
    other = networks.build("lma_student", {"width": 0.2}, Shape(1, 8, 8), 10, ("relu", {}), 0)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    file = artifacts["student"].file(stages.WEIGHTS)
    with pytest.raises(CheckpointError) as caught:
        networks.load_weights(other, file)
    assert str(caught.value).startswith(
        f"error: {file}: belongs to a network that channels were removed from, and this one is another network\n"
    )
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())

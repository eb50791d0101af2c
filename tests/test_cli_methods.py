"""What can be wrong about how a student learns: three lines from the command line, before anything is trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
from command_line import error, stored
from tiny_job import TINY

TEN = ["data.source=npz", "data.path=ten.npz"]  # images of 10x10, five classes


@pytest.fixture
def folder(tiny):
    """With the tiny recipe, images of another size and a teacher for the digits."""
    from edgekd import networks
    from edgekd.data import Shape

    images = np.random.default_rng(0).integers(0, 255, (40, 10, 10), np.uint8)
    np.savez(tiny / "ten.npz", images=images, labels=np.arange(40) % 5)
    teacher = networks.build("resnet", {"depth": 8, "width": 0.25}, Shape(1, 8, 8), 10, ("relu", {}), 0)
    networks.save_weights(teacher, tiny / "digits.safetensors", {})
    return tiny


@pytest.mark.parametrize(
    ("given", "code", "what", "rest"),
    [
        (
            ["distill.method=fitnet", "distill.student_taps=[stage.1]", "distill.teacher_taps=[stages.1]"], 2,
            'error: --set: distill.student_taps = "stage.1" is not a known module of the student',
            ['(closest: "stages.1")', 'fix:   write "stages.1" in distill.student_taps, or name modules that it has'],
        ),
        (
            [*TEN, "distill.method=dfad"], 2, "error: --set: the generator of dfad cannot make images of 10x10 pixels",
            ["multiples of 4", "fix:   use a teacher for images of 8x8 pixels, or another method"],
        ),
        (
            [*TEN, "teacher.checkpoint=digits.safetensors"], 4,
            "error: digits.safetensors: does not fit the network in 2 of 44 tensors",
            ["fc.weight: 10x16 in the file, 5x16 in the network", "fix:   give the network the options, classes"],
        ),
        (
            ["distill.train.batch_size=1"], 4,
            "error: the network has batch normalisation, which learns nothing from a batch of one sample",
            ["at least 2 samples a step", "fix:   raise train.batch_size"],
        ),
        (
            ["distill.method=dfad", "distill.train.batch_size=90"], 4,
            "error: the method takes every batch 5 times in a row, and the steps of an epoch are 2",
            ["as many steps in an epoch at least", "fix:   lower train.batch_size or how often the method replays"],
        ),
        (
            ["distill.method=online_peers", "distill.student_taps=[]"], 2,
            "error: --set: distill.student_taps names 0 modules, and the method taps one",
            ["expected: the path of the module", "fix:   name one in distill.student_taps, or leave it out"],
        ),
        (
            ["teacher=null"], 2, "error: tiny.yaml:14: distill needs a teacher for kd, and there is none",
            ["methods for classification without a teacher: ", "fix:   name a teacher: --set teacher.network=NAME"],
        ),
    ],
    ids=["tap", "generator", "classes", "batch", "replays", "taps", "teacher"],
)  # fmt: skip
def test_what_cannot_be_learned_is_told_before_training(main, folder, given, code, what, rest):
    found, out, err = main("distill", "tiny.yaml", "-q", *(word for one in given for word in ("--set", one)))
    assert (found, out, error(err)) == (code, "", what)
    for line, expected in zip(err.splitlines()[1:], rest, strict=True):
        assert expected in line
    assert stored(folder / ".edgekd") == []


def test_a_loss_that_is_not_a_number_names_its_step(main, folder):
    code, out, err = main("distill", "tiny.yaml", "-q", "--set", "teacher.train.lr=1e30")
    assert (code, out) == (4, "")
    assert error(err) == "error: the loss is not finite by step 1 of 1 (epoch 1): val_loss is nan"
    assert stored(folder / ".edgekd") == []


@pytest.mark.parametrize("method", ["angular", "online_peers", "fitnet"])
def test_a_method_that_needs_modules_cannot_train_a_graph(main, folder, method):
    """What `combined` combines counts too."""
    chosen = ["--set", "distill.method=combined", "--set", f"distill.methods=[kd, {method}]"]
    code, out, err = main("quantize", "tiny.yaml", "-q", "--set", "quantize.method=qat", *chosen)
    assert (code, out) == (2, "")
    assert error(err) == (
        "error: --set: quantize.method = qat cannot train by distill.method = combined, which looks into the student's"
        " modules"
    )


EXPERIMENT = """\
  method: staged
  epochs: [1, 2]
  methods:
    - fitnet: {student_taps: [stages.1], teacher_taps: [stages.1], ce_weight: 0}
    - combined:
        methods:
          - kd: {temperature: {linear: [4, 1]}, kd_weight: {cosine: [1, 0.5]}}
          - angular: {weight: 0.5}
          - geometric: {weight: 0.1, form: contrast}
  train: {epochs: 3}
  scratch: false
"""


@pytest.mark.slow
def test_an_experiment_is_one_file_and_gives_the_same_student_again(main, folder):
    head, rest = TINY[: TINY.index("  method: kd")], TINY[TINY.index("benchmark:") :]
    (folder / "experiment.yaml").write_text(head + EXPERIMENT + rest)
    students = []
    for store in ("one", "two"):
        code, _, err = main("distill", "experiment.yaml", "--store", store, "-q")
        assert code == 0, err
        (student,) = (folder / store).glob("store/student/*")
        students.append((student / "weights.safetensors").read_bytes())
    assert students[0] == students[1]
    (file,) = student.glob("log/metrics.jsonl")
    first, second, third = map(json.loads, file.read_text().splitlines())
    assert first.keys() >= {"train_loss_hint", "train_loss_ce"} and "train_kd_temperature" not in first
    assert third.keys() >= {"train_loss_ce", "train_loss_kd_kd", "train_loss_angular_angular"}
    assert third.keys() >= {"train_loss_geometric_geometric"}
    assert second["train_kd_temperature"] == 4 and third["train_kd_temperature"] == 2.5  # one batch an epoch

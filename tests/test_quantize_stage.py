"""Quantization as a part of a run: what the stage leaves, what reaches the engine, and how a missed budget ends."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from tiny_job import TINY, make_job

from edgekd import pipeline, registry, stages
from edgekd.data import calibration
from edgekd.errors import RecipeError
from edgekd.quantize import rules

PTQ = "quantize.method=ptq"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Of one run up to the engine, in INT8."""
    root = tmp_path_factory.mktemp("quantize") / "store"
    pipeline.run(make_job(root, PTQ), "engine-student")
    return root


def quantized(store, *overrides):
    """All artifacts of a quantized run."""
    return pipeline.run(make_job(store, PTQ, *overrides), "engine-student")


def test_the_stage_leaves_an_account(store):
    artifacts = quantized(store)
    result, exported = artifacts["quantize"].result, artifacts["onnx-student"].result
    assert result["precision"] == "int8" and result["method"] == "ptq"
    assert result["accuracy"] == {"n": 50, "float_score": exported["score"], "score": result["score"]}
    logits, labels = (np.load(artifacts["quantize"].file(name)) for name in (stages.LOGITS, stages.LABELS))
    assert result["score"] == (logits.argmax(1) == labels).mean()
    assert [row["layer"] for row in result["layers"]] and all(row["quantized"] for row in result["layers"])
    assert len(result["lma"]) == 7 and {row["layer"] for row in result["lma"]} == {
        curve["name"] for curve in json.loads(artifacts["student"].file(stages.CURVES).read_text())
    }
    assert [row["n"] for row in result["classes"]] == np.bincount(labels, minlength=10).tolist()
    assert result["findings"] == [] and result["still_float"] == []
    assert len(result["calibrate"]["tried"]) == 4
    assert result["calibration"]["n"] == sum(result["calibration"]["class_counts"].values())
    assert result["size"]["bytes"] < result["size"]["float_bytes"] == exported["size_bytes"]
    assert rules.check(onnx.load(artifacts["quantize"].file(stages.MODEL))) == []


def test_the_engine_gets_the_backends_dialect(store):
    artifacts = quantized(store)
    deployed = onnx.load(artifacts["engine-student"].file(stages.ENGINE) / "model.onnx")
    codes = {tensor.name: tensor.data_type for tensor in deployed.graph.initializer}
    assert codes["zero_point_uint8"] == onnx.TensorProto.UINT8
    assert abs(artifacts["engine-student"].result["score"] - artifacts["quantize"].result["score"]) <= 0.04
    teacher = onnx.load(artifacts["engine-teacher"].file(stages.ENGINE) / "model.onnx")
    assert not any(node.op_type == "QuantizeLinear" for node in teacher.graph.node)


def test_a_float_run_shares_everything_up_to_the_export(store):
    job = make_job(store)
    actions = {one.stage: one.action for one in pipeline.plan(job, "engine-student")}
    assert "quantize" not in actions and "finetune" not in actions
    assert actions == {
        **dict.fromkeys(("teacher", "scratch", "student", "onnx-teacher", "onnx-student", "engine-teacher"), "reuse"),
        "engine-student": "run",
    }


def test_options_decide_what_is_made_again(store):
    def action(*overrides: str) -> str:
        return {one.stage: one.action for one in pipeline.plan(make_job(store, PTQ, *overrides), "quantize")}[
            "quantize"
        ]

    assert action() == "reuse"
    assert action("budgets.accuracy_drop=0.5") == "reuse"  # without a search, the budget changes nothing
    assert action("quantize.auto_mixed=true") == "run"
    assert action("quantize.calibrate=entropy") == "run"
    assert action("quantize.calibration_seed=1") == "run"


def test_layers_named_by_the_user_stay_in_float(store):
    result = quantized(store, "quantize.calibrate=minmax", "quantize.keep_float=[fc]")["quantize"].result
    assert result["keep_float"] == ["fc"]
    assert {row["layer"]: row["quantized"] for row in result["layers"]}["fc"] is False
    assert result["still_float"] == ["fc"]


def test_the_search_starts_from_the_budget(store):
    overrides = ("quantize.auto_mixed=true", "quantize.search_minutes=0.05", "budgets.accuracy_drop=0.0")
    found = quantized(store, *overrides)["quantize"].result["search"]
    assert found["tried"][0]["keep_float"] == 0
    assert found["met"] or found["score"] >= found["tried"][0]["score"]


def test_a_named_calibration_set_is_used(store, tmp_path):
    file = tmp_path / "mine.yaml"
    calibration.save(calibration.make("digits", {}, n=40, seed=3), file)
    result = quantized(store, f"quantize.calibration={file}", "quantize.calibrate=minmax")["quantize"].result
    assert result["calibration"]["source"] == str(file)
    assert (result["calibration"]["n"], result["calibration"]["seed"]) == (40, 3)


def test_every_quantizer_goes_through_to_the_engine(store):
    for entry in registry.entries("quantizer"):
        quick = ["quantize.epochs=1"] if "epochs" in entry.options else []
        artifacts = pipeline.run(make_job(store, f"quantize.method={entry.name}", *quick), "engine-student")
        assert ("quantize" in artifacts) == (entry.name != "none")
        assert ("finetune" in artifacts) == entry.load().trains
        if "quantize" in artifacts:
            result = artifacts["quantize"].result
            assert result["size"]["bytes"] < result["size"]["float_bytes"], entry.name
            assert artifacts["engine-student"].result["score"] == pytest.approx(result["score"], abs=0.04)


def test_a_missed_budget_ends_with_code_5_and_a_report(main, store, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    line = ["quantize", tmp_path / "tiny.yaml", "--store", store, "--set", PTQ, "--set", "budgets.size_bytes=1000"]
    code, out, err = main(*line)
    assert code == 5
    assert err.splitlines()[-3].startswith("error: budgets.size_bytes = 1000 is missed: ")
    report = store / "runs" / sorted((store / "runs").iterdir())[-1].name / "report.html"
    assert "Quantization" in report.read_text()
    assert str(report) in out


def test_quantize_without_a_method_says_how_to_name_one(main, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    code, _, err = main("quantize", tmp_path / "tiny.yaml", "--store", tmp_path / "store")
    assert code == 2
    assert err.splitlines() == [
        "error: the recipe tiny asks for no quantization: quantize.method = none",
        "       see: edgekd list quantizers",
        "fix:   --set quantize.method=ptq",
    ]


def test_calib_writes_a_set_that_quantize_takes(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("calib", "digits", "--images", 60, "--seed", 1)
    assert (code, out) == (0, "calib-digits-60-1.yaml\n")
    assert calibration.load("calib-digits-60-1.yaml").selection.n == 60


def test_the_study_of_calibration_sets(main, store, tmp_path):
    (tmp_path / "tiny.yaml").write_text(TINY)
    code, out, _ = main("calib", tmp_path / "tiny.yaml", "--store", store, "--study", "--json")
    rows = json.loads(out)
    assert code == 0
    assert [(row["images"], row["seed"]) for row in rows[:3]] == [(16, 0), (16, 1), (16, 2)]
    assert rows[-1]["images"] < 256 and all(0 <= row["score"] <= 1 for row in rows)


def test_check_passes_what_tensorrt_takes(main, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = quantized(store)["quantize"].file(stages.MODEL)
    code, out, err = main("check", model, "--target", "jetson", "--json")
    found = json.loads(out)
    assert (code, found["findings"], found["version"]) == (0, [], "10.3.0"), err
    assert found["evidence"] == "linted" or found["compiled"]["int8_convolutions"] == found["compiled"]["convolutions"]


def test_check_names_what_tensorrt_refuses(main, store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = quantized(store)["engine-student"].file(stages.ENGINE) / "model.onnx"  # in ONNX Runtime's dialect
    code, out, err = main("check", model, "--target", "jetson")
    assert code == 4
    what, allowed, fix = err.splitlines()[-3:]
    assert what == f"error: jetson would refuse {model}: its codes are UINT8"
    assert "to mend; what is known: linted" in allowed and fix == "fix:   use symmetric INT8"
    assert "both of its" in out
    assert main("check", model, "--target", "local")[0] == 0


def test_check_of_no_model(main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none.onnx").write_bytes(b"no model")
    code, _, err = main("check", "none.onnx", "--target", "jetson")
    assert code == 4
    assert err.splitlines()[0].startswith("error: none.onnx is not valid ONNX: ")


def test_a_method_that_taps_modules_is_told_before_training(tmp_path):
    job = make_job(tmp_path / "store", "quantize.method=qat", "distill.method=fitnet")
    with pytest.raises(RecipeError) as caught:
        pipeline.run(job, "quantize")
    assert str(caught.value).splitlines() == [
        "error: quantize.method = qat cannot train by distill.method = fitnet, which looks into the student's modules",
        "       with rounding in place the student is a graph without modules; its logits are there",
        "fix:   set quantize.method = ptq, or distill.method = kd",
    ]
    assert not list((tmp_path / "store").glob("store/*/*"))


def test_a_calibration_set_that_is_not_there_is_told_before_training(tmp_path):
    with pytest.raises(RecipeError, match=r"the calibration set none\.yaml does not exist"):
        pipeline.run(make_job(tmp_path / "store", PTQ, "quantize.calibration=none.yaml"), "quantize")
    assert not list((tmp_path / "store").glob("store/*/*"))


@pytest.mark.parametrize("method", ["fp16", "quantized_distillation"])
def test_every_quantizers_account_makes_a_report(main, store, tmp_path, method):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--set", f"quantize.method={method}", *(["--set", "quantize.epochs=1"] if method != "fp16" else [])]
    code, out, err = main("quantize", tmp_path / "tiny.yaml", "--store", store, "--json", *options)
    assert code == 0, err
    found = json.loads(out)["quantization"]
    assert found["method"] == method and len(found["layers"]) == 8
    assert found["size"]["bytes"] < found["size"]["float_bytes"]

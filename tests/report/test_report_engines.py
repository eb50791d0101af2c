"""What the report says of engines, and the level of evidence of every claim."""

from __future__ import annotations

import pytest
from pydantic import ValidationError
from report_parts import an_engine
from tiny_job import make_job

from edgekd import pipeline
from edgekd.artifact import Artifact
from edgekd.report import Document, evidence
from edgekd.report.engine_tables import passages
from edgekd.report.engines import Claim
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document


@pytest.mark.parametrize(
    ("subject", "level", "allowed"),
    [
        ("latency", "built_on_device", False),
        ("latency", "measured_on_host", False),
        ("latency", "measured_on_device", True),
        ("energy", "linted", False),
        ("engine size", "linted", False),
        ("engine size", "compiled_by_tensorrt_rtx(1.7.1, sm_86)", False),
        ("engine size", "built_on_device", True),
        ("acceptance", "linted", True),
        ("layers", "compiled_by_tensorrt_rtx(1.7.1, sm_86)", True),
    ],
)
def test_what_needs_a_device_cannot_be_claimed_without(subject, level, allowed):
    if allowed:
        assert Claim(subject=subject, evidence=level, basis="").evidence == level
    else:
        with pytest.raises(ValidationError, match=f"{subject} cannot be claimed as"):
            Claim(subject=subject, evidence=level, basis="")


def test_every_layer_is_shown_with_what_really_ran(brief):
    found = {passage.name: passage for passage in passages(Document.model_validate(brief))}
    assert found["student-alarms"].sentences == ("1 of 5 layers that ask for INT8 run in float: conv1",)
    rows = found["student-layers"].table.rows
    assert [row.cells[3] for row in rows] == ["int8", "fp16", "int8", "int8", "int8"]
    assert [row.strong for row in rows] == [False, True, False, False, False]
    facts = dict(row.cells for row in found["student-engine"].table.rows)
    assert facts["layers in INT8"] == "4 of 5 asked for" and facts["device"] == "Orin"
    assert [row.cells[1] for row in found["evidence"].table.rows] == ["built_on_device", "measured_on_device"]
    assert "teacher-alarms" not in found and "teacher-findings" not in found


def test_both_pages_show_them(brief):
    document = Document.model_validate(brief)
    html, markdown = html_from_document(document), markdown_from_document(document)
    for text in ("1 of 5 layers that ask for INT8 run in float: conv1", "conv4 + relu4", "strongly typed"):
        assert text in html and text.replace("_", "\\_") in markdown
    assert "built_on_device" in html and "built\\_on\\_device" in markdown
    bare = Document.model_validate({**brief, "engines": {}, "evidence": []})
    assert "Nothing was compiled yet: edgekd compile." in html_from_document(bare)
    assert "Nothing was compiled yet: edgekd compile." in markdown_from_document(bare)


# ---------------------------------------------------------------- from artifacts


def artifact(**result):
    return Artifact(None, {"stage": "x", "result": result})


ENGINE = {
    "backend": "tensorrt", "facts": {"runtime": "tensorrt", "version": "10.3.0"}, "evidence": "linted", "findings": [],
    "compiled": None,
}  # fmt: skip
BUILD = {
    "backend": "tensorrt", "evidence": "built_on_device", "module": "tensorrt", "version": "10.3.0", "seconds": 3.0,
    "size_bytes": 77, "kernels": 1, "alarms": [], "mode": "flags", "layers": an_engine(1)["layers"],
    "tried": [{"mode": "strongly typed", "refused": ["no"]}], "argv": [["trtexec", "--onnx=m"]],
    "identity": {"device": "Orin", "compute_capability": "8.7", "multiprocessors": 8, "l4t": None},
    "timed": {"kernels_alone": {"latency": {"median": 0.8}}, "end_to_end": {}},
}  # fmt: skip


def claimed(artifacts):
    return [(claim.subject, claim.evidence) for claim in evidence.claims(artifacts)]


def test_a_model_that_no_compiler_has_seen_is_linted_and_has_no_size_and_no_latency():
    artifacts = {"student": artifact(), "onnx-student": artifact(), "engine-student": artifact(**ENGINE)}
    assert claimed(artifacts) == [("acceptance", "linted"), ("accuracy", "measured_on_host")]
    assert "edgekd[trt-check]" in evidence.claims(artifacts)[0].basis
    assert evidence.engine_size(artifacts) is None


def test_what_tensorrt_rtx_compiled_shows_layers_and_no_size():
    compiled = {"compiler": "tensorrt_rtx 1.7.1", "kernels": 4, "alarms": ["a"], "layers": an_engine(2)["layers"]}
    level = "compiled_by_tensorrt_rtx(1.7.1, sm_86)"
    artifacts = {"engine-student": artifact(**{**ENGINE, "evidence": level, "compiled": compiled})}
    assert claimed(artifacts) == [("acceptance", level), ("layers", level)]
    (engine,) = evidence.engines(artifacts).values()
    assert (engine.compiler, engine.kernels, len(engine.layers), engine.alarms) == ("tensorrt_rtx 1.7.1", 4, 2, ["a"])


def test_what_a_compiler_here_measured_is_told():
    ratio = {"median": 0.9, "low": 0.85, "high": 0.95}
    facts = {
        "runtime": "tvm", "version": "0.27", "kernels": 12, "unscheduled": ["odd"],
        "lma": [{"segments": 8, "form": "pick", "over_relu": {"pick": 1.03, "sum": 2.0}},
                {"segments": 4, "form": "sum", "over_relu": None}],
        "tuning": {"trials": 6, "tasks": 3, "known": 2, "ratio": ratio, "kept": "tuned"},
        "lma_table_ratio": ratio, "lma_tables": ["act"],
    }  # fmt: skip
    made = artifact(**{**ENGINE, "backend": "tvm", "evidence": "compiled_on_host", "facts": facts})
    engine = evidence.engines({"engine-student": made})["student"]
    assert engine.kernels == 12
    assert engine.alarms == ["no schedule is known for what will run slowly: odd"]
    assert engine.facts == {
        "LMA of 8 segments": "pick: chosen by measuring, 1.03 of a ReLU's loop",
        "LMA of 4 segments": "sum: by rule, not measured",
        "LMA as tables": "1 of the layers; with them 0.90 (0.85 to 0.95) of the time without",
        "tuning": "6 trials of 3 kernels, 2 known before, tuned 0.90 (0.85 to 0.95) of untuned; kept: tuned",
    }
    made = artifact(
        **{**ENGINE, "facts": {"runtime": "o", "version": "1", "kernels": {"Convolution": 3, "Pooling": 1}}}
    )
    assert evidence.engines({"engine-student": made})["student"].kernels == 4


def test_what_the_board_built_is_claimed_as_built_there():
    artifacts = {"engine-student": artifact(**ENGINE), "build-student": artifact(**BUILD)}
    built = "built_on_device"
    assert claimed(artifacts) == [
        ("acceptance", built), ("layers", built), ("engine size", built), ("latency", "measured_on_device"),
    ]  # fmt: skip
    assert evidence.engine_size(artifacts) == 77
    assert evidence.claims(artifacts)[0].basis == "tensorrt 10.3.0 on Orin"
    facts = evidence.engines(artifacts)["student"].facts
    assert facts == {
        "device": "Orin", "compute capability": "8.7", "multiprocessors": "8", "asked for by": "flags",
        "refused by strongly typed": "no", "command 1": "trtexec --onnx=m", "trtexec, kernels alone": "median 0.800 ms",
    }  # fmt: skip


@pytest.mark.parametrize("built", [{}, {"build-student": BUILD}], ids=["compiled here", "built there"])
def test_what_of_an_inference_is_copying_is_told(built):
    parts = {"copy_in": 0.1, "compute": 0.42, "copy_out": 0.05}
    bench = {"engines": {"student": {"parts_ms": parts}, "teacher": {}}}
    made = {name: artifact(**result) for name, result in {"engine-student": ENGINE, "bench": bench, **built}.items()}
    facts = evidence.engines(made)["student"].facts
    told = {name: facts[f"{name}, median"] for name in ("copy in", "compute", "copy out")}
    assert told == {"copy in": "0.100 ms", "compute": "0.420 ms", "copy out": "0.0500 ms"}


def test_a_measurement_is_claimed_as_measured_on_the_device(done):
    from edgekd.artifact import Store

    _, artifacts = pipeline.recorded(Store(done.store), done.run_id)
    assert claimed(artifacts)[:4] == [
        ("acceptance", "compiled_on_host"), ("engine size", "compiled_on_host"),
        ("accuracy", "measured_on_device"), ("latency", "measured_on_device"),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_jetson_without_a_board_ends_in_a_kit_and_claims_what_is_known_here(own_done, main):
    job = make_job(own_done.store, target="jetson")
    made = pipeline.run(job, "kit")
    levels = {claim.subject: claim.evidence for claim in evidence.claims(made)}
    assert levels["acceptance"] == made["engine-student"].result["evidence"]
    assert not {"latency", "energy", "engine size"} & set(levels)

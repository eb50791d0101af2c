"""LMA layers as tables in ONNX Runtime's engine: chosen by measurement, the same logits either way."""

from __future__ import annotations

import itertools
from unittest.mock import Mock

import numpy as np
import onnx
import onnx.parser
import pytest

from edgekd import registry
from edgekd.backends.onnxruntime import lma_tables, runner
from edgekd.errors import StageError
from edgekd.marks import LMA_MARK

# An LMA of two segments, wide and with four tensors of work inside, between codes of 8 bits.
QUANTIZED = """<ir_version: 10, opset_import: ["": 20]>
g (float[N, 4, 16, 16] images) => (float[N, 4, 16, 16] logits)
<float scale = {0.05}, uint8 zero = {128}, float slope = {0.25}, float cut = {0.1}, float step = {0.5}> {
    codes = QuantizeLinear (images, scale, zero)
    x = DequantizeLinear (codes, scale, zero)
    line = Mul (x, slope)
    above = Sub (x, cut)
    kink = Relu (above)
    scaled = Mul (kink, step)
    y = Add (line, scaled)
    out = QuantizeLinear (y, scale, zero)
    logits = DequantizeLinear (out, scale, zero)
}"""
SETTINGS = {"threads": 1, "providers": ["CPUExecutionProvider"], "graph_optimization": "all"}


def quantized():
    model = onnx.parser.parse_model(QUANTIZED)
    for node in model.graph.node:
        if node.op_type in ("Mul", "Sub", "Relu", "Add"):
            node.metadata_props.add(key=LMA_MARK, value="act")
    return model


def compiled(model, out, **options):
    out.mkdir()
    onnx.save(model, out / "given.onnx")
    facts = registry.create("backend", "onnxruntime", options=options).compile(out / "given.onnx", out, threads=1)
    operators = {node.op_type for node in onnx.load(out / "model.onnx").graph.node}
    x = np.random.default_rng(1).standard_normal((3, 4, 16, 16)).astype(np.float32)
    return facts, operators, runner.load(str(out)).run(x)


def test_tables_compute_the_same(tmp_path):
    never, form, expected = compiled(quantized(), tmp_path / "never", lma_table="never")
    always, tabled, found = compiled(quantized(), tmp_path / "always", lma_table="always")
    assert np.array_equal(found, expected) and len(np.unique(found)) > 50
    assert "GatherElements" in tabled - form and "Relu" in form - tabled
    assert (never["lma_tables"], never["lma_table_ratio"]) == ([], None)
    assert (always["lma_tables"], always["lma_table_ratio"]) == (["act"], None)


def test_auto_does_what_it_has_measured(tmp_path):
    facts, operators, _ = compiled(quantized(), tmp_path / "auto")
    ratio = facts["lma_table_ratio"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert facts["lma_tables"] == (["act"] if ratio["high"] < 1 else [])
    assert ("GatherElements" in operators) == (ratio["high"] < 1)


@pytest.mark.parametrize("ratio", [0.9, 1.1])
def test_the_engine_is_the_faster_one(tmp_path, monkeypatch, ratio):
    monkeypatch.setattr(lma_tables, "timed", lambda *given: {"median": ratio, "low": ratio, "high": ratio})
    facts, operators, _ = compiled(quantized(), tmp_path / "auto")
    assert ("GatherElements" in operators) == (facts["lma_tables"] == ["act"]) == (ratio < 1)


def test_a_provider_without_tables_runs_the_layers_as_they_are(tmp_path, monkeypatch):
    refused = Mock(side_effect=runner.ProviderError("onnxruntime would run parts of the model on the CPU"))
    monkeypatch.setattr(runner, "session", refused)
    onnx.save(quantized(), tmp_path / "model.onnx")
    facts = lma_tables.put(tmp_path / "model.onnx", SETTINGS, "auto")
    assert refused.called and facts == {"lma_tables": [], "lma_table_ratio": None}
    assert onnx.load(tmp_path / "model.onnx") == quantized()
    with pytest.raises(StageError) as caught:
        lma_tables.put(tmp_path / "model.onnx", SETTINGS, "always")
    assert str(caught.value).splitlines() == [
        "error: onnxruntime cannot run LMA layers as tables: onnxruntime would run parts of the model on the CPU",
        "       it runs them in their own form",
        "fix:   set the backend's option lma_table to auto or never",
    ]


def test_a_model_without_codes_stays_as_it_is(make_onnx, tmp_path):
    facts = registry.create("backend", "onnxruntime").compile(make_onnx(), tmp_path, threads=1)
    assert (facts["lma_tables"], facts["lma_table_ratio"]) == ([], None)
    assert (tmp_path / "model.onnx").read_bytes() == make_onnx().read_bytes()


def test_the_ratio_is_of_the_second_to_the_first():
    small, large = quantized(), quantized()
    names = ["logits", *(f"sine_{n}" for n in range(300))]
    for x, y in itertools.pairwise(names):
        large.graph.node.append(onnx.helper.make_node("Sin", [x], [y]))
    large.graph.output[0].name = names[-1]
    assert lma_tables.timed(small, large, SETTINGS)["low"] > 1
    assert lma_tables.timed(large, small, SETTINGS)["high"] < 1

"""What the pages say about a quantization: nothing that was recorded is lost, and the worst is marked."""

from __future__ import annotations

import pytest
from report_parts import CLASSES, a_quantization

from edgekd.report import quantization_figures, quantization_tables
from edgekd.report.document import Document
from edgekd.report.formatting import percent
from edgekd.report.html import html_from_document
from edgekd.report.markdown import markdown_from_document
from edgekd.report.quantization import Quantization


def passages(**changed) -> dict[str, quantization_tables.Passage]:
    part = Quantization.model_validate(a_quantization() | changed)
    return {passage.name: passage for passage in quantization_tables.passages(part)}


def cells(passage: quantization_tables.Passage) -> dict[str, dict[str, str]]:
    """{first cell: {column: cell}}."""
    table = passage.table
    return {row.cells[0]: dict(zip(table.columns, row.cells, strict=True)) for row in table.rows}


def test_what_was_done_names_the_calibration_set():
    text = " ".join(passages()["done"].sentences)
    recorded = a_quantization()["calibration"]
    for part in ("500 images", "train", "seed 3", f"{recorded['sha256'][:12]}…", "0 to 58 of each of 10 classes"):
        assert part in text
    assert "No calibration image shows truck." in text
    assert "Ranges of activations: percentile 99.99." in text
    assert "agree by 99.97% on 10,000 test samples (share of samples for which both name the same class); their" in text


def test_a_seed_that_the_source_names_is_not_said_twice():
    calibration = a_quantization()["calibration"] | {"source": "train, drawn with seed 3"}
    assert " ".join(passages(calibration=calibration)["done"].sentences).count("seed 3") == 1


@pytest.mark.parametrize(
    ("size", "words"),
    [({"float_bytes": 400, "bytes": 100}, "4.00x smaller"), ({"float_bytes": 100, "bytes": 120}, "1.20x larger")],
)
def test_cost_before_and_after(size, words):
    cost = cells(passages(size=size)["cost"])
    assert cost["Top-1"] == {"Measure": "Top-1", "Float": "91.98%", "Quantized": "91.97%", "Change": "−0.01 points"}
    assert cost["95% interval"]["Quantized"] == "91.42 to 92.49%"
    assert cost["95% interval"]["Change"] == "−0.16 to +0.14 points"
    assert cost["Model file"]["Change"] == words


def test_the_setting_that_is_used_is_marked():
    tried = cells(passages()["ranges"])
    assert {name: row["Choice"] for name, row in tried.items()} == {"minmax": "", "percentile 99.99": "used"}
    assert tried["minmax"]["Top-1"] == percent(0.912)


def test_a_setting_that_the_recipe_named_was_not_tried():
    assert "ranges" not in passages(calibrate={"method": "minmax", "percentile": None, "tried": []})


def test_layers_say_where_they_compute_and_what_they_lost():
    rows = cells(passages()["layers"])
    assert list(rows) == [row["layer"] for row in a_quantization()["layers"]]
    assert rows["stem"]["Computes in"] == "float"
    assert (rows["stem"]["Weights, dB"], rows["stem"]["Input, dB"], rows["stem"]["Output, dB"]) == ("–", "–", "exact")
    assert rows["stages.2.1.conv1"]["Computes in"] == "float all the same"
    assert rows["fc"]["Computes in"] == "integers"
    assert rows["stages.1.0.conv2"]["Output, dB"] == "12.5"


def test_the_worst_layer_is_marked_and_has_its_advice():
    found = passages()
    marked = [row.cells[0] for row in found["layers"].table.rows if row.strong]
    assert marked == ["stages.1.0.conv2"]
    assert cells(found["layers"])["stages.1.0.conv2"]["Remark"] == "worst, see advice"
    assert found["advice"].sentences == tuple(a_quantization()["suggestions"])  # each once


def test_nothing_lost_is_nothing_marked():
    layers = [row | {"output_sqnr_db": 200.0, "suggestion": ""} for row in a_quantization()["layers"]]
    found = passages(layers=layers, suggestions=[])
    assert not [row for row in found["layers"].table.rows if row.strong]
    assert "advice" not in found


def test_what_is_in_float_and_what_the_search_tried():
    passage = passages()["float"]
    assert "Kept in float: stem." in passage.sentences
    assert "Rounded, but ONNX Runtime computes them in float all the same: stages.2.1.conv1." in passage.sentences
    search = " ".join(passage.sentences)
    assert "reached its target: Top-1 91.80% on the validation split with 1 of its layers in float" in search
    assert "its time ran out" in search
    assert "stem (19.5 dB), stages.0.0.conv1 (21.5 dB), stages.0.0.conv2 (23.5 dB)" in search
    assert [row.cells for row in passage.table.rows] == [("0", "87.10%"), ("7", "91.90%"), ("1", "91.80%")]


def test_every_layer_in_integers_is_said():
    found = passages(still_float=[], keep_float=[], search=None)["float"]
    assert found.sentences == ("ONNX Runtime computes every rounded layer in integers.",)
    assert found.table is None


@pytest.mark.parametrize(("precision", "text"), [("fp16", "half"), ("fp32", "float, from codes")])
def test_other_precisions_are_not_called_integers(precision, text):
    found = passages(precision=precision, still_float=[], keep_float=[], search=None)
    assert cells(found["layers"])["fc"]["Computes in"] == text
    assert "float" not in found


def test_lma_rows():
    passage = passages()["lma"]
    assert cells(passage)["stages.2.0.act"] == {
        "Layer": "stages.2.0.act", "Largest jump": "0.500", "One code": "0.0600", "Change segment": "0.80%",
        "Inputs seen": "−5.50 to 6.50", "mu ± 3 sigma": "−3.20 to 3.40", "Beyond it": "0.20%",
    }  # fmt: skip
    assert cells(passage)["stages.0.0.act"]["One code"] == "–"
    assert "most often in stages.2.0.act: 0.80%" in passage.sentences[0]
    assert "0.60% in stages.0.0.act" in passage.sentences[1]


def test_classes_are_ordered_by_loss():
    passage = passages()["classes"]
    assert list(cells(passage)) == ["dog", "airplane", "cat", "automobile", "frog", "ship"]
    assert cells(passage)["dog"]["Change"] == "−2.10 points"
    assert passage.sentences == ("3 of 10 classes are predicted as well as before.",)


def test_many_classes_say_what_is_left_out():
    classes = [
        {"class": f"c{i}", "n": 10, "float_score": 0.9, "score": 0.9 - i / 100, "change": -i / 100}
        for i in range(1, 51)
    ]
    passage = passages(classes=classes)["classes"]
    assert list(cells(passage)) == [f"c{i}" for i in range(50, 40, -1)]
    assert passage.table.notes == ("The other 40 classes that changed are in report.json.",)
    drawn = quantization_figures.classes(Quantization.model_validate(a_quantization() | {"classes": classes}))
    assert "Shown: the 40 of 50" in drawn.caption
    assert ">c50<" in drawn.svg and ">c10<" not in drawn.svg


def test_findings_and_warnings_are_there():
    found = passages()
    assert found["findings"].table.rows[0].cells == tuple(a_quantization()["findings"][0].values())
    assert found["warnings"].sentences == ("no calibration image shows truck",)
    bare = passages(findings=[], warnings=[], lma=[], layers=[], still_float=[], classes=[], suggestions=[])
    assert not bare.keys() & {"findings", "warnings", "lma", "layers", "classes", "advice"}


def test_the_figure_marks_what_the_table_marks():
    drawn = quantization_figures.layers(Quantization.model_validate(a_quantization()))
    assert drawn.svg.count("fill: var(--worse)") == 1
    for row in a_quantization()["layers"]:
        assert f">{row['layer']}</text>" in drawn.svg
    assert ">12.5</text>" in drawn.svg and ">exact</text>" in drawn.svg


def test_a_very_deep_network_shows_its_worst_layers():
    row = a_quantization()["layers"][3]
    layers = [row | {"layer": f"conv{i}", "output_sqnr_db": 80.0 - i} for i in range(60)]
    part = Quantization.model_validate(a_quantization() | {"layers": layers, "still_float": []})
    drawn = quantization_figures.layers(part)
    assert "Shown: the 40 of 60" in drawn.caption
    assert ">conv20</text>" in drawn.svg and ">conv19</text>" not in drawn.svg


def test_no_change_draws_no_classes():
    classes = [{"class": name, "n": 5, "float_score": 1.0, "score": 1.0, "change": 0.0} for name in CLASSES]
    part = Quantization.model_validate(a_quantization() | {"classes": classes})
    assert "classes" not in quantization_figures.of_quantization(part)
    assert passages(classes=classes)["classes"].sentences == ("10 of 10 classes are predicted as well as before.",)


def test_both_pages_say_the_same(brief):
    document = Document.model_validate(brief)
    page, text = html_from_document(document), markdown_from_document(document)
    for passage in quantization_tables.passages(document.quantization):
        assert f"<h3>{passage.heading}</h3>" in page
        assert f"### {passage.heading}\n" in text
        for row in passage.table.rows if passage.table else ():
            assert all(cell in text.replace("\\", "") for cell in row.cells)


def test_the_document_keeps_its_names(document):
    assert '"class": "airplane"' in document.to_json()
    assert Document.model_validate_json(document.to_json()) == document

"""What the report says about quantization, passage by passage, for the HTML and the Markdown page alike."""

from __future__ import annotations

from edgekd.report.formatting import DASH, decibels, flat, number, p_value, percent, size, times
from edgekd.report.part import Absent, Metric
from edgekd.report.passage import Passage
from edgekd.report.quantization import CalibrationImages, FloatSearch, Quantization, QuantizedLayer
from edgekd.report.tables import SIGNIFICANT, Row, Table

METHODS = {
    "ptq": "Post-training quantization",
    "qat": "Quantization-aware training with the recipe's distillation method",
    "quantized_distillation": "Quantized distillation",
    "fp16": "Conversion to half precision",
}
PRECISIONS = {
    "int8": "convolutions and fully connected layers multiply 8-bit integers",
    "fp16": "the network computes in 16-bit floats",
    "fp32": "the weights are stored in a few bits, and the network computes in 32-bit floats",
}
CLASSES_SHOWN = 10
MOST_SENSITIVE = 3
HASH_CHARACTERS = 12


def passages(part: Quantization) -> list[Passage]:
    """Everything in the order in which it is read; a passage that has nothing to say is left out."""
    every = [
        Passage("done", "What was done", _done(part)),
        Passage("cost", "What it cost", (), _cost(part)),
        Passage("warnings", "Warnings", tuple(part.warnings)),
        Passage("advice", "What to try", advice(part)),
        Passage("ranges", "Calibration settings that were tried", (), _ranges(part)),
        Passage("layers", "Layer by layer", (), _layers(part)),
        Passage("float", "Integers and float", _in_float(part), _search(part.search, part.metric)),
        Passage("lma", "LMA under rounding", _lma_reading(part), _lma(part)),
        Passage("classes", "Class by class", _classes_reading(part), _classes(part)),
        Passage("findings", "What TensorRT takes ill", (), _findings(part)),
    ]
    return [passage for passage in every if passage.sentences or passage.table]


def advice(part: Quantization) -> tuple[str, ...]:
    """Each suggestion once: those of the layers in their order, then those about the whole."""
    return tuple(dict.fromkeys([*(row.suggestion for row in part.layers if row.suggestion), *part.suggestions]))


def worst_layer(part: Quantization) -> QuantizedLayer | None:
    """The layer whose output has lost most; None where no layer lost anything."""
    lossy = [row for row in part.layers if decibels(row.output_sqnr_db) != decibels(float("inf"))]
    return min(lossy, key=lambda row: row.output_sqnr_db, default=None)


def _done(part: Quantization) -> tuple[str, ...]:
    method = METHODS.get(part.method, part.method)
    sentences = [f"{method}: {PRECISIONS.get(part.precision, part.precision)}."]
    options = [f"{name} = {value}" for name, value in flat(part.options) if value != DASH]
    if options:
        sentences.append(f"Options: {', '.join(options)}.")
    if part.calibration:
        sentences += _calibration(part.calibration)
    if part.calibrate:
        sentences.append(f"Ranges of activations: {_setting(part.calibrate.method, part.calibrate.percentile)}.")
    if part.agreement:
        found = part.agreement
        sentences.append(
            f"The deployed graph and the model that was trained with rounding agree by {percent(found.agreement)} on "
            f"{found.n:,} test samples ({part.agree}); their logits differ by at most "
            f"{number(found.max_difference)}."
        )
    return tuple(sentences)


def _calibration(images: CalibrationImages) -> list[str]:
    counts = images.class_counts
    empty = [name for name, n in counts.items() if not n]
    seed = f"seed {images.seed}"
    about = [
        images.source,
        "" if seed in images.source else seed,
        f"{min(counts.values())} to {max(counts.values())} of each of {len(counts)} classes" if counts else "",
    ]
    digest = f"SHA-256 of the pixels {images.sha256[:HASH_CHARACTERS]}…"
    sentences = [f"Calibrated on {images.n:,} images: {', '.join(filter(None, about))} ({digest})."]
    return sentences + ([f"No calibration image shows {', '.join(empty)}."] if empty else [])


def _setting(method: str, percentile: float | None) -> str:
    return method if percentile is None else f"{method} {percentile:g}"


def _cost(part: Quantization) -> Table:
    found, files = part.accuracy, part.size
    ratio = files.float_bytes / files.bytes
    smaller = f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"
    metric = part.metric
    difference = metric.change(found.score - found.float_score)
    rows = [
        Row((metric.title, metric.text(found.float_score), metric.text(found.score), difference), strong=True),
        Row(("95% interval", metric.span(found.float_ci95), metric.span(found.ci95), _change_interval(part))),
        Row(("Model file", size(files.float_bytes), size(files.bytes), smaller)),
    ]
    binary = not isinstance(found.change, Absent) and found.change.test == "McNemar"
    how = "intervals by Wilson, of the change by Newcombe" if binary else "intervals by bootstrap"
    notes = [f"On the {found.n:,} test samples; {how}."]
    if not isinstance(found.change, Absent):
        verdict = "a significant" if found.change.p_value < SIGNIFICANT else "no significant"
        notes.append(f"{verdict.capitalize()} difference ({found.change.test} {p_value(found.change.p_value)}).")
    caption = "The same student before and after quantization"
    return Table(caption, ("Measure", "Float", "Quantized", "Change"), tuple(rows), tuple(notes))


def _change_interval(part: Quantization) -> str:
    if isinstance(part.accuracy.change, Absent):
        return DASH
    low, high = part.accuracy.change.ci95
    return f"{part.metric.bare(low)} to {part.metric.change(high)}"


def _ranges(part: Quantization) -> Table | None:
    used, text = part.calibrate, part.metric.text
    if used is None or not used.tried:
        return None
    rows = [
        Row(
            (
                _setting(trial.method, trial.percentile),
                text(trial.score),
                decibels(trial.logits_sqnr_db),
                "used" if (trial.method, trial.percentile) == (used.method, used.percentile) else "",
            )
        )
        for trial in used.tried
    ]
    in_float = "" if used.float_score is None else f"; in float {text(used.float_score)}"
    caption = f"Ways of choosing the ranges of activations, on the validation split{in_float}"
    return Table(
        caption, ("Setting", part.metric.title, "Logits, dB", "Choice"), tuple(rows), text_columns=frozenset({0, 3})
    )


def _layers(part: Quantization) -> Table | None:
    if not part.layers:
        return None
    worst = worst_layer(part)
    rows = [_layer_row(part, row, row is worst) for row in part.layers]
    columns = (
        "Layer", "Computes in", "Weights, dB", "Input, dB", "Input clipped", "Output, dB", "Output, cosine", "Remark"
    )  # fmt: skip
    notes = (
        "dB: signal to quantization noise (SQNR), higher is better; one bit is worth 6 dB. Weights and input: what the "
        "layer's own rounding loses. Output: with all that was lost before it. Clipped: share of the inputs beyond the "
        f"range. {DASH}: not rounded.",
    )
    caption = "What each layer lost, in the order of the network"
    return Table(caption, columns, tuple(rows), notes, text_columns=frozenset({0, 1, 7}))


def _layer_row(part: Quantization, row: QuantizedLayer, worst: bool) -> Row:
    remarks = [text for text, holds in (("worst", worst), ("see advice", row.suggestion)) if holds]
    cells = (
        row.layer,
        computes_in(part, row),
        decibels(row.weights_sqnr_db) if row.quantized else DASH,
        DASH if row.input_sqnr_db is None else decibels(row.input_sqnr_db),
        DASH if row.input_clipped is None else percent(row.input_clipped),
        decibels(row.output_sqnr_db),
        f"{row.output_cosine:.4f}",
        ", ".join(remarks),
    )
    return Row(cells, strong=worst)


def computes_in(part: Quantization, row: QuantizedLayer) -> str:
    """The arithmetic that ONNX Runtime uses for a layer."""
    if not row.quantized:
        return "float"
    if part.precision != "int8":
        return {"fp16": "half", "fp32": "float, from codes"}.get(part.precision, part.precision)
    return "float all the same" if row.layer in part.still_float else "integers"


def _in_float(part: Quantization) -> tuple[str, ...]:
    sentences = []
    if part.keep_float:
        sentences.append(f"Kept in float: {', '.join(part.keep_float)}.")
    fell_out = [name for name in part.still_float if name not in part.keep_float]
    if fell_out:
        sentences.append(f"Rounded, but ONNX Runtime computes them in float all the same: {', '.join(fell_out)}.")
    elif part.precision == "int8" and part.layers:
        sentences.append("ONNX Runtime computes every rounded layer in integers.")
    if part.search:
        sentences += _search_reading(part.search, part.metric)
    return tuple(sentences)


def _search_reading(found: FloatSearch, metric: Metric) -> list[str]:
    reached = "reached its target" if found.met else "did not reach its target"
    ended = "; its time ran out before every candidate was tried" if found.out_of_time else ""
    score, in_float = metric.text(found.score), metric.text(found.float_score)
    sentences = [
        f"The search for layers to keep in float {reached}: {metric.label} {score} on the validation split with "
        f"{len(found.keep_float)} of its layers in float, {in_float} for the float model{ended}."
    ]
    ranked = sorted(found.sensitivity_db.items(), key=lambda pair: pair[1])[:MOST_SENSITIVE]
    if ranked:
        named = ", ".join(f"{name} ({decibels(lost)} dB)" for name, lost in ranked)
        sentences.append(f"Rounded alone, these disturb the logits most: {named}.")
    return sentences


def _search(found: FloatSearch | None, metric: Metric) -> Table | None:
    if found is None:
        return None
    rows = [Row((str(trial.keep_float), metric.text(trial.score))) for trial in found.tried]
    columns = ("Layers in float", f"{metric.label}, validation")
    return Table("What the search tried, in its order", columns, tuple(rows))


def _lma_reading(part: Quantization) -> tuple[str, ...]:
    if not part.lma:
        return ()
    moved = max(part.lma, key=lambda row: row.changed_segment)
    beyond = max(part.lma, key=lambda row: row.outside)
    return (
        f"Rounding moves inputs over a cut most often in {moved.layer}: {percent(moved.changed_segment)} of them land "
        f"in another segment, where the output may jump by up to {number(moved.max_jump)}.",
        f"Most inputs beyond mu ± 3 sigma, where the outermost segments go on: {percent(beyond.outside)} in "
        f"{beyond.layer}.",
    )


def _lma(part: Quantization) -> Table | None:
    moved = max((row.changed_segment for row in part.lma), default=0.0)
    rows = [
        Row(
            (
                row.layer,
                number(row.max_jump),
                DASH if row.step is None else number(row.step),
                percent(row.changed_segment),
                f"{number(row.low)} to {number(row.high)}",
                f"{number(row.range_low)} to {number(row.range_high)}",
                percent(row.outside),
            ),
            strong=row.changed_segment == moved > 0,
        )
        for row in part.lma
    ]
    columns = (
        "Layer", "Largest jump", "One code", "Change segment", "Inputs seen", "mu ± 3 sigma", "Beyond it"
    )  # fmt: skip
    notes = (
        "Largest jump: of the output at a cut. One code: the width of a rounding step of the input. Change segment: "
        "share of the inputs that rounding moves over a cut.",
    )
    return Table("What rounding does to the input of each LMA layer", columns, tuple(rows), notes) if rows else None


def _classes_reading(part: Quantization) -> tuple[str, ...]:
    same = sum(row.change == 0 for row in part.classes)
    return (f"{same} of {len(part.classes)} classes are predicted as well as before.",) if same else ()


def _classes(part: Quantization) -> Table | None:
    changed = sorted((row for row in part.classes if row.change), key=lambda row: row.change or 0.0)
    if not changed:
        return None
    text, change = part.metric.text, part.metric.change
    rows = [
        Row((row.name, f"{row.n:,}", text(row.float_score or 0.0), text(row.score or 0.0), change(row.change or 0.0)))
        for row in changed[:CLASSES_SHOWN]
    ]
    left_out = len(changed) - len(rows)
    notes = (f"The other {left_out} classes that changed are in report.json.",) if left_out else ()
    name = f"{part.metric.of_class[:1].upper()}{part.metric.of_class[1:]}"
    columns = ("Class", "Samples", "Float", "Quantized", "Change")
    return Table(f"{name} of each class that changed, the largest loss first", columns, tuple(rows), notes)


def _findings(part: Quantization) -> Table | None:
    rows = tuple(Row((one.node, one.rule, one.effect, one.reason, one.fix)) for one in part.findings)
    columns = ("Node", "Rule", "Effect", "Why", "What to do")
    caption = "Rules of TensorRT that the graph breaks"
    return Table(caption, columns, rows, text_columns=frozenset(range(5))) if rows else None

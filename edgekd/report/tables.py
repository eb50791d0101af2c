"""What the report says in words and tables, in one form that both the HTML and the Markdown page print."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgekd.report.document import NETWORKS, RUNGS, Confusion, Document, LadderRow, Latency
from edgekd.report.formatting import (
    DASH,
    count,
    fact,
    milliseconds,
    number,
    p_value,
    percent,
    points,
    quantity,
    size,
    times,
)
from edgekd.report.part import Absent, Metric

RUNG_LABELS = {
    "teacher": "Teacher",
    "scratch": "Student, labels only",
    "student": "Student, distilled",
    "onnx": "ONNX",
    "quantized": "Quantized",
    "engine": "Engine",
    "device": "On the device",
}
FINETUNED = "Student, with rounding"
NO_SUCH_RUNG = "This run has no such rung."
SIGNIFICANT = 0.05
CHANGED_CLASSES = 10


@dataclass(frozen=True)
class Row:
    """One line of a table; an absent one has only its first cell and a `reason`."""

    cells: tuple[str, ...]
    reason: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Columns and rows of text; the first cell of a row names it, columns outside `text_columns` are numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    text_columns: frozenset[int] = frozenset({0})
    code_columns: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Finding:
    """One headline figure: its name, its value, and what the reader must know to trust it."""

    name: str
    value: str
    detail: str
    good: bool | None = None


def headline(document: Document) -> str:
    """What changed, in one line: "4.21x faster, −0.40 points of accuracy, on raspberry-pi-5".

    Without a teacher, what there is: "Accuracy 91.20%, median 4.30 ms, not compared with a teacher, on raspberry-pi-5".
    """
    speedup, change = document.verdict.speedup, document.verdict.accuracy_change
    if isinstance(speedup, Absent) and isinstance(change, Absent):
        said = ", ".join([*_measured(document), "not compared with a teacher"])
        return f"{said[:1].upper()}{said[1:]}, on {document.target_name}"
    if isinstance(change, Absent):
        accuracy = f"{document.metric.noun} not compared"
    else:
        accuracy = _change_in_words(document.metric, change.value)
    if document.verdict.status == "NOT_MEASURED":
        return f"{accuracy[:1].upper()}{accuracy[1:]}, speed not measured on {document.target_name}"
    if isinstance(speedup, Absent):
        speed = "Speed not compared"
    elif speedup.ci95[0] <= 1 <= speedup.ci95[1]:
        speed = "As fast as its teacher"
    else:
        speed = f"{times(speedup.value)} faster" if speedup.value > 1 else f"{times(1 / speedup.value)} slower"
    return f"{speed}, {accuracy}, on {document.target_name}"


def _measured(document: Document) -> list[str]:
    """The student's own score and latency, as far as they are known."""
    metric, row, student = document.metric, _last_scored(document), document.latency.student
    said = []
    if row is not None and row.score is not None:
        said.append(f"{metric.noun} {metric.text(row.score)} {metric.unit}".strip())
    if not isinstance(student, Absent):
        said.append(f"median {milliseconds(student.p50_ms)}")
    return said + (["speed not measured"] if said and isinstance(student, Absent) else [])


def _last_scored(document: Document) -> LadderRow | None:
    """The student at the last step on its way to the device that was scored."""
    rows = [row for row in document.ladder if row.score is not None and row.rung not in ("teacher", "scratch")]
    return rows[-1] if rows else None


def _change_in_words(metric: Metric, change: float) -> str:
    return (
        f"equal {metric.noun}"
        if metric.change(change) == metric.change(0)
        else f"{metric.change(change)} of {metric.noun}"
    )


def findings(document: Document) -> list[Finding]:
    """The headline figures: speed-up, accuracy change, size, 99th percentile, budgets."""
    return [_speedup(document), _accuracy(document), _size(document), _tail(document), _budgets_met(document)]


def _speedup(document: Document) -> Finding:
    speedup = document.verdict.speedup
    if isinstance(speedup, Absent):
        return Finding("Speed-up", DASH, speedup.reason)
    low, high = speedup.ci95
    return Finding("Speed-up", times(speedup.value), f"{speedup.of}; 95% interval {times(low)} to {times(high)}")


def _accuracy(document: Document) -> Finding:
    change, metric, row = document.verdict.accuracy_change, document.metric, _last_scored(document)
    noun = f"{metric.noun[:1].upper()}{metric.noun[1:]}"
    name = f"{noun} change"
    if isinstance(change, Absent) and row and row.score is not None and row.ci95 is not None:
        text = f"{metric.text(row.score)} {metric.unit}".strip()
        return Finding(noun, text, f"95% interval {metric.span(row.ci95)}. {change.reason}")
    if isinstance(change, Absent):
        return Finding(name, DASH, change.reason)
    low, high = (metric.bare(end) for end in change.ci95)
    significance = "a significant" if change.p_value < SIGNIFICANT else "no significant"
    detail = f"95% interval {low} to {high}; {significance} difference ({change.test} {p_value(change.p_value)})"
    return Finding(name, metric.change(change.value), detail)


def _size(document: Document) -> Finding:
    teacher = document.row("teacher")
    deployed = [row for row in map(document.row, ("onnx", "quantized", "engine", "device")) if row and row.size_bytes]
    if not deployed or not deployed[-1].size_bytes:
        return Finding("Size", DASH, "The run did not record the size of the student.")
    if not teacher or not teacher.size_bytes:
        return Finding("Size", size(deployed[-1].size_bytes), "Not compared with a teacher.")
    ratio = teacher.size_bytes / deployed[-1].size_bytes
    text = f"{times(ratio)} smaller" if ratio >= 1 else f"{times(1 / ratio)} larger"
    return Finding("Size", text, f"{size(deployed[-1].size_bytes)}; teacher {size(teacher.size_bytes)}")


def _tail(document: Document) -> Finding:
    student, teacher = document.latency.student, document.latency.teacher
    if isinstance(student, Absent):
        return Finding("Latency, p99", DASH, student.reason)
    other = f". {teacher.reason}" if isinstance(teacher, Absent) else f"; teacher {milliseconds(teacher.p99_ms)}"
    return Finding("Latency, p99", milliseconds(student.p99_ms), f"median {milliseconds(student.p50_ms)}{other}")


def _budgets_met(document: Document) -> Finding:
    all_budgets = document.verdict.budgets
    if not all_budgets:
        return Finding("Budgets", DASH, "The recipe sets no budget.")
    missed = [budget.name for budget in all_budgets if budget.met is False]
    unknown = [budget.name for budget in all_budgets if budget.met is None]
    met = len(all_budgets) - len(missed) - len(unknown)
    told = [f"{what}: {', '.join(names)}" for what, names in (("missed", missed), ("not measured", unknown)) if names]
    detail = "; ".join(told) or "every budget of the recipe is met"
    good = False if missed else None if unknown else True
    return Finding("Budgets", f"{met} of {len(all_budgets)} met", detail, good=good)


def budgets(document: Document) -> Table | Absent:
    """The recipe's limits and what was measured against them."""
    if not document.verdict.budgets:
        return Absent(reason="The recipe sets no budget.")
    rows = [
        Row(
            (
                budget.name,
                f"{budget.bound} {_budgeted(document, budget.name, budget.limit)}",
                DASH if budget.value is None else _budgeted(document, budget.name, budget.value),
                "not measured" if budget.met is None else "met" if budget.met else "MISSED",
            )
        )
        for budget in document.verdict.budgets
    ]
    return Table(
        "The limits of the recipe and what was measured against them",
        ("Budget", "Limit", "Measured", "Result"),
        tuple(rows),
    )


def _budgeted(document: Document, name: str, value: float) -> str:
    return document.metric.loss(value) if name == "accuracy_drop" else quantity(name, value)


def ladder(document: Document) -> Table:
    """Accuracy and cost at every step from the teacher to the device; every rung is named, measured or not."""
    teacher = document.row("teacher")
    compared = ("To teacher", "Agreement") if teacher and teacher.score is not None else ()
    also = tuple(dict.fromkeys(label for row in document.ladder for label in row.also))
    rows = tuple(_ladder_row(document.metric, rung, document.row(rung), teacher, also) for rung in RUNGS)
    costs = ("Samples", "Size", "Params", "MACs")
    columns = ("Rung", document.metric.title, "95% interval", *compared, *costs, *also)
    reading = (
        f"To teacher: {document.metric.label} minus the teacher's"
        + (", in percentage points. " if document.metric.share else ". ")
        + f"Agreement with the teacher: {document.agree}. "
    )
    notes = (f"{reading if compared else ''}{DASH}: not recorded at this rung.",)
    return Table("Accuracy ladder, every rung on the same test samples", columns, rows, notes)


def ladder_reading(document: Document) -> list[str]:
    """What the ladder says in words: the smaller network, its teacher's gift, the way to the device."""
    scores = {row.rung: row.score for row in document.ladder if row.score is not None}
    gift = "teacher" if "teacher" in scores else "method"
    steps = (
        ("teacher", "student", "From the teacher to the distilled student"),
        (
            "scratch",
            "student",
            f"What the {gift} gave: the distilled student against the same student trained on the labels only",
        ),
        ("onnx", "quantized", "What quantization cost"),
        ("student", "device", "On the way from the trained student to the device"),
    )
    return [
        f"{text}: {document.metric.change(scores[b] - scores[a])}."
        for a, b, text in steps
        if a in scores and b in scores
    ]


def _ladder_row(
    metric: Metric, rung: str, row: LadderRow | None, teacher: LadderRow | None, also: tuple[str, ...]
) -> Row:
    label = RUNG_LABELS[rung]
    if row is None or row.score is None or row.ci95 is None or row.n is None:
        return Row((label,), reason=(row and row.reason) or NO_SUCH_RUNG)
    compared: tuple[str, ...] = ()
    if teacher is not None and teacher.score is not None:
        change = DASH if rung == "teacher" else metric.bare(row.score - teacher.score)
        compared = (change, _or_dash(row.agreement_with_teacher, percent))
    cells = (
        label,
        metric.text(row.score),
        metric.span(row.ci95),
        *compared,
        f"{row.n:,}",
        _or_dash(row.size_bytes, size),
        _or_dash(row.params, count),
        _or_dash(row.macs, count),
        *(percent(row.also[label]) if label in row.also else DASH for label in also),
    )
    return Row(cells, strong=rung in ("teacher", "device"))


def attack(document: Document) -> Table | Absent:
    """What is left of each network's accuracy when its images are attacked."""
    found = document.attack
    if isinstance(found, Absent):
        return found
    rows = []
    for one in found.networks:
        low, high = one.robust_ci95
        interval = f"{percent(low).removesuffix('%')} to {percent(high)}"
        cells = (RUNG_LABELS[one.network], percent(one.top1), percent(one.robust_top1), interval)
        rows.append(Row((*cells, percent(one.sanity_top1), f"{one.n:,}"), strong=one.network == "student"))
    columns = (
        "Network",
        "As they are",
        "Under attack",
        "95% interval",
        f"Within {found.sanity_epsilon:g}/255",
        "n",
    )
    how = f"PGD-{found.steps} within {found.epsilon:g}/255, in steps of {found.step_size:g}/255"
    notes = (
        f"Attack: {how}, by each network's own gradient.",
        f"Within {found.sanity_epsilon:g}/255 an attack must succeed: what is left there is not robustness.",
        *found.warnings,
    )
    caption = "Accuracy on the test images, as they are and under attack"
    return Table(caption, columns, tuple(rows), notes)


def _energy(model: Latency, rail: str) -> float | None:
    return next((one.per_inference_mj for one in model.energy if one.rail == rail), None)


def latency(document: Document) -> Table | Absent:
    """Both models' latency side by side, and by what factor the student is better; without a teacher, its own."""
    student, teacher = document.latency.student, document.latency.teacher
    if isinstance(student, Absent):
        return student
    lines: list[tuple[str, Callable[[Latency], float | None], Callable[[float], str]]] = [
        ("p50", lambda m: m.p50_ms, milliseconds),
        ("p90", lambda m: m.p90_ms, milliseconds),
        ("p99", lambda m: m.p99_ms, milliseconds),
        ("p90, early stopping", lambda m: m.p90_early_stopping_ms, milliseconds),
        ("p99, early stopping", lambda m: m.p99_early_stopping_ms, milliseconds),
        ("mean", lambda m: m.mean_ms, milliseconds),
        ("standard deviation", lambda m: m.std_ms, milliseconds),
        ("throughput", lambda m: m.throughput_per_s, lambda v: f"{number(v)} /s"),
        ("time to import the runtime", lambda m: m.import_ms, milliseconds),
        ("time to load the model", lambda m: m.load_ms, milliseconds),
        ("peak memory (RSS)", lambda m: m.peak_rss_bytes, size),
        ("inferences timed", lambda m: m.n, lambda v: f"{v:,.0f}"),
        ("warm-up, not timed", lambda m: m.warmup_n, lambda v: f"{v:,.0f}"),
    ]
    lines += [
        (f"energy, rail {one.rail}", partial(_energy, rail=one.rail), lambda v: f"{number(v)} mJ")
        for one in student.energy
    ]
    measured_teacher = None if isinstance(teacher, Absent) else teacher
    rows = []
    for name, value, text in lines:
        ours, theirs = value(student), value(measured_teacher) if measured_teacher else None
        ratio = times(ours / theirs if name == "throughput" else theirs / ours) if ours and theirs else ""
        ratio = "" if name in COUNTED else ratio
        beside = (_or_dash(theirs, text), ratio) if measured_teacher else ()
        rows.append(Row((name, _or_dash(ours, text), *beside), strong=name == "p50"))
    notes = [
        "Early stopping: MLPerf's estimate, an upper bound of the percentile that holds with 99% confidence; "
        f"{DASH}: too few inferences for it, or not recorded."
    ]
    if isinstance(teacher, Absent):
        notes.append(f"Teacher not measured: {teacher.reason}")
    files = [m.samples_file for m in (student, measured_teacher) if m and m.samples_file]
    if files:
        notes.append(f"Every sample: {', '.join(files)}")
    columns = ("Measure", "Student", *(("Teacher", "Student better by") if measured_teacher else ()))
    query = "One inference" if student.samples_per_query == 1 else f"A query of {student.samples_per_query} samples"
    caption = f"{query} on {document.target_name}" + (", both models in one session" if measured_teacher else "")
    return Table(caption, columns, tuple(rows), tuple(notes))


COUNTED = ("inferences timed", "warm-up, not timed")


def launches(document: Document) -> Table | Absent:
    """How far the speed-up of one launch lies from that of another."""
    speedup = document.verdict.speedup
    if isinstance(speedup, Absent):
        return speedup
    ratios = sorted(speedup.by_launch)
    if not ratios:
        return Absent(reason="The run did not record the speed-up of single launches.")
    cells = (f"{len(ratios)}", *(times(ratio) for ratio in (ratios[0], speedup.value, ratios[-1])))
    spread = percent((ratios[-1] - ratios[0]) / speedup.value)
    columns = ("Launches", "Lowest", "Median", "Highest", "Spread")
    notes = ("Spread: highest minus lowest, as a share of the median. What differs here would differ next time.",)
    return Table("Speed-up of each launch of fresh processes", columns, (Row((*cells, spread)),), notes)


def training(document: Document) -> Table:
    """How long each network was trained and where it ended on the validation split."""
    text, noun = document.metric.text, document.metric.noun
    best = max if document.metric.higher_is_better else min
    rows = []
    for name in NETWORKS:
        run = document.training.get(name)
        if run is None and name == "finetune":
            continue  # most recipes have none
        label = FINETUNED if name == "finetune" else RUNG_LABELS[name]
        if run is None or isinstance(run, Absent):
            rows.append(Row((label,), reason=run.reason if run else "This run did not train it."))
            continue
        scores = [epoch.val_score for epoch in run.epochs if epoch.val_score is not None]
        seconds = sum(epoch.seconds for epoch in run.epochs)
        cells = (
            label,
            str(len(run.epochs)),
            number(run.epochs[-1].train_loss),
            text(scores[-1]) if scores else DASH,
            text(best(scores)) if scores else DASH,
            f"{number(seconds)} s",
        )
        rows.append(Row(cells))
    columns = ("Network", "Epochs", "Final loss", f"Final {noun}", f"Best {noun}", "Time")
    return Table("What each training cost and where it ended on the validation split", columns, tuple(rows))


def changed_classes(confusion: Confusion) -> Table | Absent:
    """The classes whose recall the student changed most against the teacher."""
    if isinstance(confusion.teacher, Absent):
        return confusion.teacher
    student, teacher = (recall(matrix) for matrix in (confusion.student, confusion.teacher))
    change = student - teacher
    order = sorted(range(len(change)), key=lambda c: (-abs(np.nan_to_num(change[c])), c))[:CHANGED_CLASSES]
    rows = [
        Row((confusion.classes[c], percent(teacher[c]), percent(student[c]), points(change[c]).removesuffix(" points")))
        for c in order
        if not np.isnan(change[c])
    ]
    return Table("Classes that changed most (recall)", ("Class", "Teacher", "Student", "Change, points"), tuple(rows))


def recall(matrix: list[list[int]]) -> np.ndarray:
    """Share of each true class that is predicted right, [K]; NaN for a class without samples."""
    counts = np.asarray(matrix, dtype=float)
    samples = counts.sum(axis=1)
    return np.where(samples > 0, np.diag(counts) / np.maximum(samples, 1), np.nan)


def artifacts(document: Document) -> Table | Absent:
    """What every stage made, with the hash that identifies it."""
    if not document.artifacts:
        return Absent(reason="The run recorded no artifact.")
    rows = [
        Row((made.stage, made.sha256, made.key, size(made.size_bytes), fact(made.files))) for made in document.artifacts
    ]
    columns = ("Stage", "SHA-256", "Store key", "Size", "Files")
    caption = "What each stage made; the SHA-256 identifies it"
    return Table(caption, columns, tuple(rows), text_columns=frozenset({0, 1, 2, 4}), code_columns=frozenset({1, 2}))


def _or_dash(value: float | None, text: Callable[..., str]) -> str:
    return DASH if value is None else text(value)

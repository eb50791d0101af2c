"""What the report says about how the engines were asked, for the HTML and the Markdown page alike."""

from __future__ import annotations

from edgekd.report.document import Document
from edgekd.report.formatting import DASH, MINUS, milliseconds, number, percent, quantity, times
from edgekd.report.measuring import EndToEnd, Fps, Loadgen, MultiStream, Offline, Sustained, Window
from edgekd.report.part import Absent
from edgekd.report.passage import Passage
from edgekd.report.tables import Row, Table

HEADINGS = {
    "single_stream": "Single stream: one inference after the other",
    "multi_stream": "Multiple stream: several samples a query",
    "offline": "Offline: throughput by batch size",
    "fps": "Frames on a clock",
    "sustained": "Sustained: latency against temperature",
}


def passages(document: Document) -> list[Passage] | Absent:
    """The mode, and what was measured besides it."""
    if isinstance(document.mode, Absent):
        return document.mode
    mode, table = document.mode, None
    sentences: tuple[str, ...] = ("Each inference began when the last one was answered; the latencies are above.",)
    match mode:
        case MultiStream():
            sentences = _multi_stream(mode)
        case Offline():
            sentences, table = _offline(mode), _sweep(mode)
        case Fps():
            sentences, table = _fps(mode), _frames(mode)
        case Sustained():
            sentences, table = _sustained(mode), _windows(mode)
    found = [Passage(mode.name, HEADINGS[mode.name], sentences, table)]
    if document.end_to_end:
        heading = "End to end: from the stored image to the answer"
        found.append(Passage("end_to_end", heading, _end_to_end(document.end_to_end), _steps(document.end_to_end)))
    if document.loadgen:
        found.append(Passage("loadgen", "Cross-check by LoadGen", (), _loadgen(document.loadgen)))
    return found


def _multi_stream(mode: MultiStream) -> tuple[str, ...]:
    ways = {True: "as one batch", False: "one sample after the other: its engine was made for one"}
    took = [f"The {model} took a query {ways[batched]}." for model, batched in mode.batched.items()]
    return (f"A query is {mode.samples_per_query} samples; its latency is that of the last one answered.", *took)


def _offline(mode: Offline) -> tuple[str, ...]:
    best = {model: max(row.throughput_per_s for row in rows) for model, rows in mode.sweep.items()}
    return tuple(
        f"The {model} computes most at batch {mode.best_batch[model]}: {number(best[model])} samples a second,"
        f" {times(best[model] / rows[0].throughput_per_s)} of what it does at batch {rows[0].batch}."
        for model, rows in mode.sweep.items()
    )


def _sweep(mode: Offline) -> Table:
    rows = [
        Row(
            (
                f"{model}, batch {row.batch}",
                f"{number(row.throughput_per_s)} /s",
                milliseconds(row.p50_ms),
                milliseconds(row.p90_ms),
                milliseconds(row.p50_ms / row.batch),
                f"{row.queries:,}",
            ),
            strong=row.batch == mode.best_batch[model],
        )
        for model, sweep in mode.sweep.items()
        for row in sweep
    ]
    columns = ("Model", "Throughput", "p50 of a batch", "p90 of a batch", "p50 per sample", "Batches timed")
    return Table("Throughput and latency by batch size, the best of each model strong", columns, tuple(rows))


def _fps(mode: Fps) -> tuple[str, ...]:
    period = milliseconds(1e3 / mode.fps)
    sentences = [
        f"A frame arrives every {period}, {number(mode.fps)} a second; its deadline is the arrival of the next one. "
        "A frame that arrives while another is computed waits; its latency counts from its arrival."
    ]
    for model, found in mode.models.items():
        if found.busy_share >= 1:
            sentences.append(
                f"The {model} cannot keep up: it needs {milliseconds(found.computing_p50_ms)} a frame, so its queue "
                "grows for as long as frames come, and its latencies say how long that was."
            )
    return tuple(sentences)


def _frames(mode: Fps) -> Table:
    rows = [
        Row(
            (
                model.capitalize(),
                f"{found.missed:,} of {found.frames:,}",
                percent(found.missed_share),
                f"{percent(found.ci95[0]).removesuffix('%')} to {percent(found.ci95[1])}",
                milliseconds(found.computing_p50_ms),
                milliseconds(found.waited_p99_ms),
                percent(found.busy_share),
                f"{number(found.highest_fps)} /s",
            )
        )
        for model, found in mode.models.items()
    ]
    columns = (
        "Model", "Deadlines missed", "Share", "95% interval", "Computing, p50", "Waited, p99", "Busy", "Highest rate",
    )  # fmt: skip
    notes = (
        "Busy: computing time as a share of the time between frames. Highest rate: frames a second if none came late. "
        "The interval takes frames as independent; where a queue forms they are not, and it is too narrow.",
    )
    return Table("Deadlines missed and what they cost", columns, tuple(rows), notes)


def _sustained(mode: Sustained) -> tuple[str, ...]:
    first, last = mode.windows[0], mode.windows[-1]
    ahead = f"Ahead at the start: the {first.rank[0]}, speed-up {_ratio(first)}. "
    ahead += f"At the end: the {last.rank[0]}, speed-up {_ratio(last)}."
    sentences = [
        *([ahead] if first.speedup else []),
        *(
            f"The {model}'s median latency changed by {change:+.1%} from the first window to the last.".replace(
                "-", "−"
            )
            for model, change in mode.slower.items()
        ),
    ]
    if first.temperature_c is not None and last.temperature_c is not None:
        sentences.append(
            f"The hottest sensor went from {quantity('start_c', first.temperature_c)} to "
            f"{quantity('end_c', last.temperature_c)}."
        )
    told = [f"The device says: {reason.removeprefix('throttled: ')}." for reason in mode.throttling]
    return (*sentences, *(told or ["The device reported no throttling."]))


def _windows(mode: Sustained) -> Table:
    rows = [
        Row(
            (
                f"{number(window.start_s)} to {number(window.end_s)} s",
                *(milliseconds(window.p50_ms[model]) for model in window.p50_ms),
                *((_ratio(window), window.rank[0]) if window.speedup else ()),
                DASH if window.temperature_c is None else quantity("hottest_c", window.temperature_c),
                DASH if window.clock_hz is None else quantity("clock_hz", window.clock_hz),
            )
        )
        for window in mode.windows
    ]
    models = (f"{model.capitalize()}, p50" for model in mode.windows[0].p50_ms)
    compared = ("Speed-up", "Ahead") if mode.windows[0].speedup else ()
    columns = ("Window", *models, *compared, "Hottest", "Clock")
    caption = "From the start to the end" + (", both models in turn" if compared else "")
    return Table(caption, columns, tuple(rows), text_columns=frozenset({0, *([4] if compared else [])}))


def _ratio(window: Window) -> str:
    if window.speedup is None:
        return DASH
    low, high = window.speedup.ci95
    return f"{times(window.speedup.value)} ({times(low)} to {times(high)})"


def _end_to_end(found: EndToEnd) -> tuple[str, ...]:
    sentences = []
    if found.speedup is not None:
        low, high = found.speedup.ci95
        whole = f"From the stored image to the answer, the student is {times(found.speedup.value)} as fast as the"
        sentences.append(f"{whole} teacher (95% interval {times(low)} to {times(high)}).")
    for model, one in found.models.items():
        share = one.steps_ms["infer"] / sum(one.steps_ms.values())
        sentences.append(f"The {model} itself takes {percent(share)} of that time.")
    return (*sentences, f"Decoder: {found.decoder}.")


def _steps(found: EndToEnd) -> Table:
    models = list(found.models.values())
    rows = [Row((step, *(milliseconds(one.steps_ms[step]) for one in models))) for step in models[0].steps_ms]
    for name in ("p50", "p90", "p99"):
        rows.append(
            Row((f"all, {name}", *(milliseconds(getattr(one, f"{name}_ms")) for one in models)), strong=name == "p50")
        )
    rows.append(Row(("images timed", *(f"{one.n:,}" for one in models))))
    columns = ("Step", *(model.capitalize() for model in found.models))
    notes = ("Steps: medians. Timed in blocks between those of the model alone, by the same processes.",)
    return Table("Time by step, from the stored image to the answer", columns, tuple(rows), notes)


def _loadgen(found: Loadgen) -> Table:
    rows = [
        Row(
            (
                model.capitalize(),
                milliseconds(one.agent_p50_ms),
                milliseconds(one.p50_ms),
                percent(one.agent_over_loadgen - 1).replace("-", MINUS),
                f"{milliseconds(min(one.p50_by_turn_ms))} to {milliseconds(max(one.p50_by_turn_ms))}",
                milliseconds(one.p90_ms),
                milliseconds(one.p99_ms),
                f"{one.n:,}",
            )
        )
        for model, one in found.models.items()
    ]
    columns = (
        "Model", "p50, edgekd", "p50, LoadGen", "Difference", "LoadGen, by turn", "p90, LoadGen", "p99, LoadGen",
        "Queries",
    )  # fmt: skip
    notes = (
        f"MLPerf's LoadGen {found.version}, single stream, on the same machine after the benchmark, not between its "
        "blocks: what other programs did meanwhile is in the difference.",
    )
    return Table("The same engines timed by LoadGen", columns, tuple(rows), notes)

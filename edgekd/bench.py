"""Deploy two engines to a device, time them against each other there and score them on the same samples."""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import signal
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgekd import stats
from edgekd.backends import Engine
from edgekd.device import AGENT, JSON_LIMIT_BYTES, Device, Finished, Job, last_lines, parsed
from edgekd.errors import ConnectionLost, RecipeError, StageError

_log = logging.getLogger(__name__)
Progress = Callable[[float, float, str], None]  # share done, seconds left, stage

MIN_LAUNCHES = 6  # fewer give no 95 % interval: see stats.median_interval
BLOCK_S = 0.05  # long against a scheduler tick, short against what heat and other programs do
MIN_QUERIES = 64  # MLPerf: below this no p90 holds with 99 % confidence
MAX_STRETCH = 6  # a slow engine may take this many times the seconds asked for to reach MIN_QUERIES
SETUP_TIMEOUT_S = 300.0  # to load the runtime and the engines of one launch on a slow board
MAX_NPY_BYTES = 1 << 30
ATTEMPTS = 5  # to go on after an interruption

# A result is VALID when the machine was so quiet and steady that it would repeat. Each limit with its reason:
MAX_FOREIGN_CPU = 0.10  # share of all cores that others used; above it they compete for cores, cache and clock
MAX_STEAL = 0.02  # share of all cores' time that the hypervisor gave to other machines
MAX_UNSETTLED = 0.25  # share of launches whose warm-up did not settle; a single one is absorbed by the medians
MAX_BLOCK_CV = 0.05  # spread of the blocks' medians; trtexec warns above 2.5 %, on boards with locked clocks
MAX_TREND = 0.05  # from the first third to the last: heat or clocks moved the whole result
MAX_CLOCK_CHANGE = 0.05  # of the fastest core's clock, 5th to 95th percentile over the run
# The flags of a Raspberry Pi's firmware that tell of the present.
THROTTLED = {
    1: "the supply voltage was too low: use the board's own power supply",
    2: "the firmware capped the clock",
    4: "the firmware throttled the board",
    8: "the temperature reached its soft limit: cool the board",
}


def benchmark(
    student: Engine,
    teacher: Engine,
    *,
    samples: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    device: Device,
    workdir: Path,
    seconds: float = 10.0,
    launches: int = 9,
    mode: Literal["single_stream"] = "single_stream",
    lock_clocks: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `student` against `teacher` on `device`; leave raw latencies and logits in `workdir`.

    samples: float32 [N, C, H, W] as the networks take them; labels: int64 [N]; seconds: timed, both engines together,
    in all launches; launches: 9 are the fewest whose interval survives one odd launch at either end; lock_clocks: hold
    the device's clocks at their highest meanwhile, which needs root there.

    Raises RecipeError for fewer than 6 launches, StageError when an engine cannot be run there. A measurement that does
    not hold is no error: its `status` is INVALID, with `reasons`.
    """
    if launches < MIN_LAUNCHES:
        raise RecipeError(
            f"benchmark.launches = {launches} is too few for a 95 % interval",
            allowed=f"at least {MIN_LAUNCHES}",
            fix=f"--set benchmark.launches={MIN_LAUNCHES}",
        )
    workdir.mkdir(parents=True, exist_ok=True)
    engines = {"student": student, "teacher": teacher}
    settings = {
        "version": 1,
        "mode": mode,
        "launches": launches,
        "min_seconds": seconds,
        "max_seconds": MAX_STRETCH * seconds,
        "min_queries": MIN_QUERIES,
        "block_seconds": BLOCK_S,
        "lock_clocks": lock_clocks,
        "seed": seed,
    }
    # Loading must not take forever, nor a query more than a second: it is there for a device that hangs.
    timeout = launches * SETUP_TIMEOUT_S + 2 * MAX_STRETCH * seconds + len(samples)
    bundle = _bundle(engines, samples, settings, workdir)
    # Named by what is measured: a benchmark that a killed host left on the device is gone on with.
    with device.job(_sha256(workdir / "spec.json")[:16]) as job:
        job.put(bundle)
        argv = [job.python, "-m", "agent", "bench", "spec.json", "--lifeline"]
        _measure(job, argv, timeout, on_progress)
        measured = _fetch(job, engines, workdir)
    tables = {name: table_from_latencies(workdir / f"{name}_latency.npy", name) for name in engines}
    if [len(_rounds(table)) for table in tables.values()] != [len(_rounds(tables["student"]))] * len(tables):
        raise StageError(
            f'benchmark on "{device.url}": student and teacher were not timed in the same rounds',
            allowed="each round times both",
            fix="measure again: edgekd bench",
        )
    correct = {name: correct_from_logits(workdir / f"{name}_logits.npy", labels, name) for name in engines}
    return summarize(measured, tables, correct) | {"settings": settings, "argv": argv, "url": device.url}


def summarize(
    measured: Mapping[str, Any],
    tables: Mapping[str, npt.NDArray[np.int64]],
    correct: Mapping[str, npt.NDArray[np.bool_]],
) -> dict[str, Any]:
    """The result of a measurement: a pure function of what the agent wrote.

    tables: rows (launch, block, start_ns, duration_ns) by model; correct: bool [N] by model.
    """
    change, interval = stats.paired_difference(correct["teacher"], correct["student"])
    won, lost = (correct["student"] & ~correct["teacher"]).sum(), (correct["teacher"] & ~correct["student"]).sum()
    launches = speedups(tables["student"], tables["teacher"])
    speedup, speedup_interval = stats.median_interval(launches)
    reasons = invalid_because(measured, tables)
    return {
        "status": "INVALID" if reasons else "VALID",
        "reasons": reasons,
        "latency": {name: _latency(tables[name], measured["models"][name], name) for name in tables},
        "accuracy": {name: _accuracy(correct[name], name) for name in correct},
        "speedup": {"value": speedup, "ci95": list(speedup_interval)},
        "accuracy_change": {"value": change, "ci95": list(interval), "p_value": stats.mcnemar_p(int(won), int(lost))},
        "speedup_by_launch": launches.tolist(),
        "telemetry": _telemetry(measured["telemetry"], measured["device"]["cores"]),
        "device": measured["device"],
        "energy": {name: _energy(launches) for name, launches in measured["models"].items()},
        "interruptions": measured["interruptions"],
        "engines": {name: launches[0]["facts"] for name, launches in measured["models"].items()},
    }


def speedups(student: npt.NDArray[np.int64], teacher: npt.NDArray[np.int64]) -> stats.Floats:
    """Teacher's time over student's, by launch.

    Rounds are compared with themselves, so that what slows both falls out. A launch counts as one observation, so that
    the interval holds for the next launch too (T. Kalibera and R. Jones, "Rigorous benchmarking in reasonable time",
    ISMM 2013: repeat at the highest level that varies).
    """
    ratios: dict[int, list[float]] = {}
    for ours, theirs in zip(_rounds(student), _rounds(teacher), strict=True):
        ratios.setdefault(int(ours[0, 0]), []).append(float(np.median(theirs[:, 3]) / np.median(ours[:, 3])))
    return np.array([np.median(of_launch) for of_launch in ratios.values()])


def _rounds(table: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The table cut into rounds: two blocks each."""
    launch, block = table[:, 0], table[:, 1]
    return np.split(table, np.flatnonzero((np.diff(launch) != 0) | (np.diff(block // 2) != 0)) + 1)


# ---------------------------------------------------------------- does it hold


def invalid_because(measured: Mapping[str, Any], tables: Mapping[str, npt.NDArray[np.int64]]) -> list[str]:
    """Why the measurement does not hold; empty when it does."""
    reasons = []
    for name, table in tables.items():
        medians = np.array([np.median(rows[:, 3]) for rows in _rounds(table)])
        if len(table) < MIN_QUERIES:
            reasons.append(f"too short: {len(table)} queries of the {name}, at least {MIN_QUERIES} are needed for p90")
        launches = measured["models"][name]
        unsettled = sum(not launch["warmup_stable"] for launch in launches)
        if unsettled > MAX_UNSETTLED * len(launches):
            reasons.append(f"unstable: the {name} did not settle in {unsettled} of {len(launches)} warm-ups")
        if (cv := stats.robust_cv(medians)) > MAX_BLOCK_CV:
            reasons.append(
                f"unstable: the {name}'s medians vary by {cv:.1%} over time, at most {MAX_BLOCK_CV:.0%} allowed"
            )
        if abs(drift := stats.trend(medians)) > MAX_TREND:
            reasons.append(f"unstable: the {name}'s latency drifted by {drift:+.1%}, at most {MAX_TREND:.0%} allowed")
    if measured["device"]["emulated"]:
        reasons.append(f"emulated: {measured['device']['machine']} is emulated there, its times are not a board's")
    return reasons + _disturbances(measured["telemetry"], measured["device"]["cores"])


def _disturbances(telemetry: list[dict[str, Any]], cores: int) -> list[str]:
    """What else the machine did meanwhile."""
    reasons, seconds = [], sum(row["seconds"] for row in telemetry)
    for key, limit, what in (
        ("foreign_cpu_s", MAX_FOREIGN_CPU, "other processes used"),
        ("steal_s", MAX_STEAL, "the hypervisor took away"),
    ):
        share = sum(row.get(key, 0.0) for row in telemetry) / (seconds * cores)
        if share > limit:
            reasons.append(f"foreign load: {what} {share:.0%} of the CPU, at most {limit:.0%} allowed")
    clocks = [max(row["clock_hz"]) for row in telemetry if row["clock_hz"]]
    if clocks:
        low, high = np.quantile(clocks, [0.05, 0.95])
        if high / low - 1 > MAX_CLOCK_CHANGE:
            reasons.append(f"clocks changed: from {low / 1e6:.0f} to {high / 1e6:.0f} MHz during the run")
    return reasons + _throttling(telemetry)


def _throttling(telemetry: list[dict[str, Any]]) -> list[str]:
    """What the device itself says of power and heat."""
    flags = {row["throttled"] or 0 for row in telemetry}
    reasons = [f"throttled: {what}" for bit, what in THROTTLED.items() if any(flag & bit for flag in flags)]
    counts = [row["throttle_count"] for row in telemetry]
    if counts and max(counts) > min(counts):
        reasons.append(f"throttled: the processor slowed down {max(counts) - min(counts)} times because it was too hot")
    return reasons


# ---------------------------------------------------------------- figures


def _telemetry(rows: list[dict[str, Any]], cores: int) -> dict[str, Any]:
    """The agent's rows as series: seconds since the start, and readings named with their unit."""
    zones = sorted({zone for row in rows for zone in row["temperature_c"]})
    series: dict[str, list[float | None]] = {
        f"{zone}_c": [row["temperature_c"].get(zone) for row in rows] for zone in zones
    }
    series["clock_hz"] = [max(row["clock_hz"], default=None) for row in rows]
    series["load_average"] = [row["load_average"] for row in rows]
    for rail in sorted({rail for row in rows for rail in row["power_mw"]}):
        series[f"{rail}_mw"] = [row["power_mw"].get(rail) for row in rows]
    series["throttled_flags"] = [row["throttled"] for row in rows]
    for name in ("foreign_cpu", "steal"):
        series[f"{name}_share"] = [
            None if row.get(f"{name}_s") is None else max(0.0, row[f"{name}_s"] / (row["seconds"] * cores))
            for row in rows
        ]
    known = {name: values for name, values in series.items() if any(value is not None for value in values)}
    return {"time_s": [row["time_s"] for row in rows], "series": known}


def _latency(table: npt.NDArray[np.int64], launches: list[dict[str, Any]], name: str) -> dict[str, Any]:
    values = table[:, 3] / 1e6
    p50, p90, p99 = np.quantile(values, [0.5, 0.9, 0.99])
    peaks = [launch["peak_rss_bytes"] for launch in launches if launch["peak_rss_bytes"] is not None]
    return {
        "p50_ms": float(p50),
        "p90_ms": float(p90),
        "p99_ms": float(p99),
        "p90_early_stopping_ms": stats.early_stopping_percentile(values, 0.90),
        "p99_early_stopping_ms": stats.early_stopping_percentile(values, 0.99),
        "mean_ms": float(values.mean()),
        "std_ms": float(values.std(ddof=1)),
        "n": len(values),
        "warmup_n": sum(launch["warmup_n"] for launch in launches),
        "throughput_per_s": float(1e3 / values.mean()),
        "import_ms": float(np.median([launch["import_ms"] for launch in launches])),
        "load_ms": float(np.median([launch["load_ms"] for launch in launches])),
        "peak_rss_bytes": max(peaks, default=None),
        "samples_file": f"{name}_latency.npy",
    }


def _energy(launches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Energy of one inference by rail, while it was timed: the median of the launches."""
    by_rail: dict[tuple[str, str], list[float]] = {}
    for launch in launches:
        for row in launch["energy"]:
            by_rail.setdefault((row["rail"], row["sensor"]), []).append(row["mj"] / row["queries"])
    return [
        {"rail": rail, "sensor": sensor, "per_inference_mj": float(np.median(values)), "launches": len(values)}
        for (rail, sensor), values in by_rail.items()
    ]


def _accuracy(correct: npt.NDArray[np.bool_], name: str) -> dict[str, Any]:
    return {
        "top1": float(correct.mean()),
        "n": len(correct),
        "ci95": list(stats.wilson(int(correct.sum()), len(correct))),
        "logits_file": f"{name}_logits.npy",
    }


# ---------------------------------------------------------------- to the device and back


def _bundle(
    engines: Mapping[str, Engine], samples: npt.NDArray[np.float32], settings: Mapping[str, Any], workdir: Path
) -> dict[str, Path]:
    """All that the device gets, by its name there. The spec among it holds the sha256 of all the rest."""
    np.save(workdir / "samples.npy", np.ascontiguousarray(samples, np.float32))
    sent = {"agent": AGENT, "samples.npy": workdir / "samples.npy"}
    for name, engine in engines.items():
        sent |= {name: engine.folder, f"{name}_runner.py": engine.runner}
    models = [{"name": name, "folder": name, "runner": f"{name}_runner.py"} for name in engines]
    spec = dict(settings, models=models, samples="samples.npy", files=_sha256_by_name(sent))
    (workdir / "spec.json").write_text(json.dumps(spec, indent=2), encoding="utf-8")
    # Empty, in the place of one that an earlier run may have left there.
    (workdir / "result.json").write_bytes(b"")
    return sent | {"spec.json": workdir / "spec.json", "result.json": workdir / "result.json"}


def _measure(job: Job, argv: list[str], timeout: float, on_progress: Progress | None) -> None:
    """Run the agent to its end. After a lost connection, a restart of the device or the agent's death it goes on with
    the launch that was interrupted."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            finished = job.run(argv, timeout=timeout, on_stderr_line=_progress_line(on_progress))
        except ConnectionLost as error:
            if attempt == ATTEMPTS:
                raise
            if _is_over(job):
                return
            _log.warning("%s; the benchmark goes on when it is back", error.what)
            continue
        if finished.status >= 0:
            break
        _log.warning("%s: the agent was killed; the benchmark goes on", job.device.url)
    if finished.status:
        raise _failure(finished, job.device.url)


def _is_over(job: Job) -> bool:
    """Whether the agent came to its end before the connection did."""
    with tempfile.TemporaryDirectory() as folder:
        job.get("result.json", Path(folder, "result.json"), limit_bytes=JSON_LIMIT_BYTES)
        return Path(folder, "result.json").stat().st_size > 0


def _sha256_by_name(sent: Mapping[str, Path]) -> dict[str, str]:
    """The digest of every file below the given files and folders, by its path on the device."""
    digests = {}
    for name, path in sent.items():
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file() and "__pycache__" not in file.parts:
                target = name if file == path else f"{name}/{file.relative_to(path).as_posix()}"
                digests[target] = _sha256(file)
    return digests


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _fetch(job: Job, engines: Mapping[str, Engine], workdir: Path) -> dict[str, Any]:
    job.get("result.json", workdir / "result.json", limit_bytes=JSON_LIMIT_BYTES)
    for name in engines:
        for file in (f"{name}_latency.npy", f"{name}_logits.npy"):
            job.get(file, workdir / file, limit_bytes=MAX_NPY_BYTES)
    return parsed((workdir / "result.json").read_text(encoding="utf-8"), "the agent's result.json")


def _progress_line(on_progress: Progress | None) -> Callable[[str], None]:
    def on_line(line: str) -> None:
        report = _said(line, "progress")
        if on_progress and report:
            on_progress(float(report["progress"]), float(report["left_s"]), str(report["stage"]))

    return on_line


def _said(line: str, key: str) -> dict[str, Any] | None:
    """The agent's own line about `key`, among all that a runtime may print."""
    if not line.startswith(f'{{"{key}"'):
        return None
    try:
        return parsed(line, "a line of the agent")
    except StageError:
        return None


def _failure(finished: Finished, url: str) -> StageError:
    lines = [line for line in finished.stderr_tail if not _said(line, "progress")]
    what, fix = "the agent ended without a result", "see whether the engine runs there by itself"
    if finished.status < 0:
        what = f"the agent was killed {ATTEMPTS} times (signal {signal.Signals(-finished.status).name})"
        fix = "see whether the memory there is enough: sudo dmesg | tail"
    elif lines and (last := _said(lines[-1], "error")):
        what = str(last["error"])
        lines.pop()
    if "numpy is not installed" in what:
        fix = shlex.join(["edgekd", "doctor", "--device", url, "--install"])
    elif "sha256" in what:
        fix = "send it again: edgekd bench"
    return StageError(f'benchmark on "{url}": {what}', allowed=last_lines(lines) if lines else "", fix=fix)


def table_from_latencies(path: Path, name: str) -> npt.NDArray[np.int64]:
    """The rows (launch, block, start_ns, duration_ns) in a file. Raises StageError when it holds something else."""
    table = _array(path)
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype != np.int64 or (table[:, 3] <= 0).any():
        raise StageError(
            f"{path.name} does not hold the latencies of the {name}: {table.dtype} {list(table.shape)}",
            allowed="expected: int64 [N, 4], durations above 0",
            fix="measure again: edgekd bench",
        )
    return table


def correct_from_logits(path: Path, labels: npt.NDArray[np.int64], name: str) -> npt.NDArray[np.bool_]:
    """Which samples the logits [N, K] in a file get right, bool [N]. Raises StageError when they cannot be scored."""
    logits = _array(path)
    if logits.ndim != 2 or len(logits) != len(labels):
        raise StageError(
            f"the {name} gave logits {list(logits.shape)} for {len(labels)} samples",
            allowed=f"expected: [{len(labels)}, K]",
            fix="see whether the engine runs by itself, and measure again",
        )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        what = f"the {name}'s logits are not finite, first for sample {int(finite.argmin())}"
        raise StageError(what, allowed="expected: finite numbers", fix="check the export and the precision")
    return np.asarray(logits.argmax(axis=1) == labels)


def _array(path: Path) -> npt.NDArray[Any]:
    """An array from a device: never a pickle, and never more memory than the file has bytes."""
    try:
        array: npt.NDArray[Any] = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
        return array
    except (ValueError, OSError, EOFError) as error:
        raise StageError(
            f"{path.name} from the device is no array: {error}", allowed="expected: a .npy file", fix="measure again"
        ) from error

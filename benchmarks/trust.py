"""Whether a result of `edgekd bench` can be trusted: the same model twice, a planted slowdown, foreign load, sampling.

    python benchmarks/trust.py [aa] [planted] [sampling] [foreign] [--runs 20] [--seconds 10] [--report]

aa: the same engine as student and as teacher; the 95 % interval of the speed-up shall cover 1.0.
planted: the teacher's runner waits 3 % longer; the interval shall lie above 1.0, which is p < 0.05 of the sign test.
foreign: as aa, while as many other processes as there are cores compute; the result shall be INVALID.
sampling: the same engine twice, and sensors are read before and while one of them is on turn only; the ratio of the
two is what sampling costs. The sensors are files laid out as an Orin Nano has them: a real monitor's bus is slower, and
what its driver costs shows on the board alone.

The engine is ONNX Runtime with an untrained ResNet-20 for 32x32 images. All runs are of fresh processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from agent_overhead import prepare, resnet20
from results import table, write_section

from edgekd import registry, stats
from edgekd.backends import Engine
from edgekd.bench import benchmark
from edgekd.bench.latencies import speedups
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import board_files

SLOWDOWN = 0.03
RUNS = {"aa": 20, "planted": 20, "sampling": 10, "foreign": 5}
# The same runner, and then as long a wait as a share of what it took.
SLOWED = f"""

class Slowed:
    def __init__(self, runner):
        self._runner, self.facts = runner, runner.facts

    def run(self, x):
        import time
        start = time.perf_counter_ns()
        logits = self._runner.run(x)
        until = start + (time.perf_counter_ns() - start) * {1 + SLOWDOWN}
        while time.perf_counter_ns() < until:
            pass
        return logits

_load = load

def load(folder):
    return Slowed(_load(folder))
"""
# Sensors are read for the model "sampled" alone: before its turns, and by the meter's thread while it is on turn.
ONE_SIDED = """
import sys, threading
from agent import conductor, power
from agent.__main__ import main
from agent.sensors import Sensors

class OneSided(power.Meter):
    def __init__(self, rails):
        self._on, self._read_now, self._sensors = threading.Event(), rails.power_mw, Sensors(ROOT)
        self._on.set()
        rails.power_mw = lambda: self._on.wait() and self._read_now()
        super().__init__(rails)

    def begin(self, model, turn):
        if model == "sampled":
            self._on.set()
            self._sensors.sample()
        else:
            self._on.clear()
        super().begin(model, turn)

    def close(self):
        self._on.set()
        super().close()

ROOT = sys.argv[sys.argv.index("--root") + 1]
conductor.Meter = OneSided
conductor.Watch.sample = lambda self: None
sys.exit(main())
"""


class Pairs:
    """Two engines of one model, measured against each other by `edgekd bench`."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds, self.model = folder, seconds, resnet20(folder)
        backend = registry.create("backend", "onnxruntime")
        engine = folder / "engine"
        engine.mkdir()
        backend.compile(self.model, engine, threads=1)
        slowed = folder / "slowed.py"
        slowed.write_text(backend.runner.read_text(encoding="utf-8") + SLOWED, encoding="utf-8")
        self.plain, self.slowed = (Engine(r.stem, engine, r, "onnxruntime") for r in (backend.runner, slowed))
        self.samples = np.random.default_rng(0).standard_normal((64, 3, 32, 32)).astype(np.float32)

    def measure(self, teacher: Engine, seed: int) -> dict[str, Any]:
        judge = Judge(Classification(), np.zeros(64, np.int64), (10,))
        return benchmark(
            self.plain, teacher, samples=self.samples, judge=judge, device=Device("local:", self.folder / "jobs"),
            workdir=self.folder / "work", mode=SingleStream(seconds=self.seconds), seed=seed,
        )  # fmt: skip

    def sampling(self, seed: int) -> tuple[float, stats.Interval]:
        """Latency while sensors are read over that without: median of the launches and its interval."""
        board = Path(tempfile.mkdtemp(dir=self.folder))
        prepare(board, self.model, self.seconds, names=("sampled", "alone"), launches=9, seed=seed)
        root = board_files.write(board / "root", board_files.JETSON_ORIN_NANO)
        argv = [sys.executable, "-c", ONE_SIDED, "bench", "spec.json", "--root", str(root)]
        subprocess.run(argv, cwd=board, check=True, capture_output=True)
        return stats.median_interval(speedups(*(np.load(board / f"{n}_latency.npy") for n in ("alone", "sampled"))))


@contextmanager
def foreign_load(processes: int) -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def speedup_runs(name: str, pairs: Pairs, runs: int) -> list[str]:
    """A row of the table: how many runs were as they shall be."""
    as_wanted, invalid, values = 0, 0, []
    for run in range(runs):
        with foreign_load((os.cpu_count() or 1) * (name == "foreign")):
            result = pairs.measure(pairs.slowed if name == "planted" else pairs.plain, seed=run)
        low, high = result["speedup"]["ci95"]
        values.append(result["speedup"]["value"])
        invalid += result["status"] == "INVALID"
        as_wanted += {"aa": low <= 1 <= high, "planted": low > 1, "foreign": result["status"] == "INVALID"}[name]
        print(f"{name} {run}: {values[-1]:.4f} ({low:.4f} to {high:.4f}) {result['status']}", flush=True)
    return [name, f"{as_wanted} of {runs}", f"{min(values):.4f} to {max(values):.4f}", f"{invalid}"]


def sampling_runs(pairs: Pairs, runs: int) -> list[str]:
    values, covered = [], 0
    for run in range(runs):
        value, (low, high) = pairs.sampling(run)
        values.append(value)
        covered += low <= 1 <= high
        print(f"sampling {run}: {value:.4f} ({low:.4f} to {high:.4f})", flush=True)
    return ["sampling", f"{covered} of {runs}", f"{min(values):.4f} to {max(values):.4f}", "–"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(RUNS))
    parser.add_argument("--runs", type=int, help="of each kind, instead of " + str(RUNS))
    parser.add_argument("--seconds", type=float, default=SingleStream().seconds)
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        pairs = Pairs(Path(folder), arguments.seconds)
        rows = [
            (sampling_runs if what == "sampling" else partial(speedup_runs, what))(pairs, arguments.runs or RUNS[what])
            for what in arguments.what
        ]
    text = table(["what", "as it shall be", "ratios of the runs", "INVALID"], rows)
    print(text)
    if arguments.report:
        load = json.dumps([round(value, 1) for value in os.getloadavg()])
        body = (
            f"Runs of {arguments.seconds:g} s each, ResNet-20 in ONNX Runtime, {os.cpu_count()} cores"
            f", load average {load} at the end. aa: the interval covers 1.0; planted: it lies above 1.0; foreign: the "
            f"result is INVALID; sampling: the interval covers 1.0.\n\n{text}\n\nMade by `benchmarks/trust.py`."
        )
        write_section("trust", "Whether a benchmark can be trusted", body)


if __name__ == "__main__":
    main()

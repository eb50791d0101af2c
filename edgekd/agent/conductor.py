"""Leads the workers through a benchmark: who runs when, what the machine did meanwhile, how long it will take."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

from . import VERSION
from .clocks import Locked
from .errors import AgentError
from .launches import Launches
from .machine import facts
from .power import Meter, Rails
from .sensors import Sensors, read

ACCURACY_CHUNK = 256  # samples between two progress lines
FULL_BYTES = 1 << 16  # who has less left has a full disk
ROW_BYTES = 48  # of a query in the table of latencies
SETUP_GUESS_S = 1.0  # per launch, until the first one has shown how long it takes


class Model:
    """The conductor's end of a worker."""

    def __init__(self, model: dict[str, str], samples: str) -> None:
        self.name = model["name"]
        self.report = {}  # type: dict[str, Any]
        threads = str(json.loads(read(os.path.join(model["folder"], "engine.json")))["threads"])
        self.process = subprocess.Popen(
            [sys.executable, "-m", __package__, "work", json.dumps(model), samples],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, OMP_NUM_THREADS=threads, OPENBLAS_NUM_THREADS=threads, MKL_NUM_THREADS=threads),
        )

    def send(self, do: str, **arguments: Any) -> None:
        """Give a command."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(dict(arguments, do=do)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # receive() says what the process died of

    def receive(self) -> dict[str, Any]:
        """Wait for the reply. Raises AgentError when the command failed or the process died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            died = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
            raise AgentError(f"{self.name}: its process died ({died})")
        reply = json.loads(line)  # type: dict[str, Any]
        if "error" in reply:
            raise AgentError(f"{self.name}: {reply['error']}")
        return reply

    def call(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Give a command and wait for its reply."""
        self.send(do, **arguments)
        return self.receive()

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Watch:
    """Keeps the telemetry: what the machine did between two looks, apart from what our own processes did."""

    def __init__(self, began: float, launch: int, pids: list[int], root: str) -> None:
        self.began, self.launch, self.pids, self.sensors = began, launch, pids, Sensors(root)
        self.meter = Meter(Rails(root))
        self.series = []  # type: list[dict[str, Any]]
        self._last = self._look()

    def _look(self) -> tuple[float, float, tuple[float, float] | None]:
        own = sum(self.sensors.process_cpu_seconds(pid) for pid in self.pids)
        return time.perf_counter(), own, self.sensors.cpu_seconds()

    def sample(self) -> None:
        """Add a row about the time since the last one."""
        (before, own_before, cpu_before), (now, own, cpu) = self._last, self._look()
        self._last = now, own, cpu
        row = dict(self.sensors.sample(), launch=self.launch, time_s=now - self.began, seconds=now - before)
        row["power_mw"] = self.meter.power_mw()
        if cpu is not None and cpu_before is not None:
            row["own_cpu_s"] = own - own_before
            row["foreign_cpu_s"] = cpu[0] - cpu_before[0] - (own - own_before)
            row["steal_s"] = cpu[1] - cpu_before[1]
        self.series.append(row)


class Bench:
    """One benchmark: launches of timed rounds, then the accuracy pass."""

    def __init__(self, spec: dict[str, Any], root: str = "/") -> None:
        try:
            import numpy as np
        except ImportError:
            raise AgentError(f"numpy is not installed for {sys.executable}") from None
        if spec["version"] != VERSION:
            raise AgentError(f"spec of version {spec['version']}: this agent knows version {VERSION}")
        self.spec, self.root = spec, root
        verify(spec["files"])
        self.count = len(np.load(spec["samples"], mmap_mode="r", allow_pickle=False))
        self.telemetry = []  # type: list[dict[str, Any]]
        self.launches = Launches(spec)
        # An interrupted benchmark's clock goes on where it stopped.
        self.started = time.perf_counter() - self.launches.seconds
        self.expected_s = spec["min_seconds"] + SETUP_GUESS_S * spec["launches"]
        self.measured_s, self.shown = self.launches.measured_s, 0.0
        self.table_bytes = self.answers_bytes = 0  # of all models, in one launch; 0 before any

    def run(self) -> None:
        """Do it all; leaves result.json. Raises AgentError when a model cannot be run, or the disk is full."""
        try:
            self.run_launches()
        except (AgentError, OSError):
            # A file that could not be written whole is reported in as many ways as there are libraries.
            free = shutil.disk_usage(".").free
            if free > FULL_BYTES:
                raise
            needed = f", about {self.lacking_bytes() / 1e6:.1f} MB needed" if self.table_bytes else ""
            raise AgentError(f"the disk is full: {free / 1e6:.1f} MB free{needed}, in {os.getcwd()}") from None

    def lacking_bytes(self) -> int:
        """Of the tables of the launches to come, of all tables joined, and of the answers."""
        launches = self.spec["launches"]  # type: int
        return self.table_bytes * (2 * launches - len(self.launches.done)) + self.answers_bytes

    def run_launches(self) -> None:
        """Those that are not there yet, and what all have given together."""
        launches = self.spec["launches"]
        clocks = Locked(self.root) if self.spec["lock_clocks"] else None
        for launch in range(len(self.launches.done), launches):
            models = [Model(model, self.spec["samples"]) for model in self.spec["models"]]
            self.progress("load")
            for model in models:
                model.report.update(model.call("load", pictures=self.spec["pictures"]))
            for model in models:
                model.report["warm_up"] = [_warm_up(model, turn) for turn in self.spec["turns"]]
            # Whoever goes first in a round goes last in the rounds of the next launch: no place is better on average.
            self.measure(models if launch % 2 == 0 else models[::-1], launch)
            if launch == launches - 1:
                self.classify(models)
            for model in models:
                model.call("save", **self.launches.files(model.name, launch))
                model.close()
            reports = {model.name: model.report for model in models}
            self.launches.add(reports, self.telemetry, self.started, self.measured_s)
        self.expected_s = 0.0
        self.progress("done")
        result = dict(self.launches.join(), version=VERSION, device=facts(self.root))
        if clocks:
            clocks.close()
        with open("result.part", "w") as file:
            json.dump(result, file)
        os.replace("result.part", "result.json")
        self.launches.forget()

    def measure(self, models: list[Model], launch: int) -> None:
        """Time rounds; in each, every model gets every turn of the spec."""
        spec, launches = self.spec, self.spec["launches"]
        queries = {
            model.name: [_queries(turn, model.report["warm_up"][number]) for number, turn in enumerate(spec["turns"])]
            for model in models
        }
        pids = [os.getpid()] + [model.process.pid for model in models]
        watch = Watch(self.started, launch, pids, self.root)
        started = time.perf_counter()
        elapsed, rounds, enough = 0.0, 0, False
        while elapsed * launches < spec["max_seconds"] and not (enough and elapsed * launches >= spec["min_seconds"]):
            for number in range(len(spec["turns"])):
                self.take_turns(models, launch, rounds, number, queries, watch.meter)
            watch.sample()
            rounds += 1
            enough = 2 * rounds * min(min(counts) for counts in queries.values()) * launches >= spec["min_queries"]
            elapsed = time.perf_counter() - started
            self.expect(models, launch, elapsed)
            self.progress("measure")
        watch.meter.close()
        self.table_bytes = ROW_BYTES * 2 * rounds * sum(map(sum, queries.values()))
        self.answers_bytes = self.count * sum(model.report["answer_bytes"] for model in models)
        for model in models:
            model.report["energy"] = watch.meter.of(model.name)
        self.measured_s += elapsed
        self.telemetry = watch.series

    def take_turns(
        self, models: list[Model], launch: int, rounds: int, number: int, queries: dict[str, list[int]], meter: Meter
    ) -> None:
        """Every model runs one block, then every model again in reverse order (A B B A), so that a drift that is linear
        in time falls on all alike."""
        turn, seed = self.spec["turns"][number], self.spec["seed"] + 1000 * launch + rounds
        for place, model in enumerate(models + models[::-1]):
            meter.begin(model.name, number)
            block = {
                "launch": launch,
                "block": 2 * rounds + place // len(models),
                "queries": queries[model.name][number],
                "seed": seed,
            }
            if turn["end_to_end"]:
                answer = model.call("block_end_to_end", **block)
            else:
                answer = model.call("block", samples=turn["samples"], every_ns=turn["every_ns"], **block)
            meter.end(answer["answered"])

    def expect(self, models: list[Model], launch: int, elapsed: float) -> None:
        """Update how long the whole will take, from what the launches took so far."""
        done = time.perf_counter() - self.started
        setup = (done - self.measured_s - elapsed) / (launch + 1)
        per_launch = max(elapsed, self.spec["min_seconds"] / self.spec["launches"])
        accuracy = self.count * max(_sample_s(model, self.spec["turns"][0]) for model in models)
        self.expected_s = done + per_launch - elapsed + accuracy
        self.expected_s += (self.spec["launches"] - launch - 1) * (setup + per_launch)

    def classify(self, models: list[Model]) -> None:
        """Every sample once through every model, all models at a time: nothing is timed here."""
        for start in range(0, self.count, ACCURACY_CHUNK):
            self.progress("accuracy")
            for model in models:
                model.send("classify", start=start, stop=min(self.count, start + ACCURACY_CHUNK))
            for model in models:
                model.receive()

    def progress(self, stage: str) -> None:
        """Tell whoever listens how far we are."""
        done = time.perf_counter() - self.started
        left = max(0.0, self.expected_s - done)
        self.shown = max(self.shown, round(done / (done + left), 4))  # a bar that goes back worries people
        line = {"progress": self.shown, "left_s": round(left, 1), "stage": stage}
        sys.stderr.write(json.dumps(line) + "\n")
        sys.stderr.flush()


def _warm_up(model: Model, turn: dict[str, Any]) -> dict[str, Any]:
    return model.call("warm_up_end_to_end") if turn["end_to_end"] else model.call("warm_up", samples=turn["samples"])


def _queries(turn: dict[str, Any], warm_up: dict[str, Any]) -> int:
    """How many fill a block."""
    fitting = turn["block_seconds"] * 1e9 / (turn["every_ns"] or warm_up["median_ns"])  # type: float
    return max(1, round(fitting))


def _sample_s(model: Model, turn: dict[str, Any]) -> float:
    return float(model.report["warm_up"][0]["median_ns"] / turn["samples"] / 1e9)


def verify(files: dict[str, str]) -> None:
    """Refuse to run files that are not, byte for byte, those that were sent."""
    for name, expected in sorted(files.items()):
        digest = hashlib.sha256()
        try:
            with open(name, "rb") as file:
                for chunk in iter(lambda: file.read(1 << 20), b""):
                    digest.update(chunk)
        except OSError as error:
            raise AgentError(f"{name} cannot be read: {error.strerror}") from None
        if digest.hexdigest() != expected:
            raise AgentError(f"{name} is corrupted: its sha256 is not the one in the spec")

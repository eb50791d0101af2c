"""One model in one process: load it, warm it up, time it, score it."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any

from .sensors import read

WARMUP_WINDOW_S = 0.03  # long enough that one scheduler tick does not move the window's median
WARMUP_TOLERANCE = 0.03  # three windows in a row within 3 % of each other: the clocks have settled
WARMUP_CAP_S = 3.0  # a machine that has not settled by then will not; the result then says so
FIRST_QUERIES = 3  # queries until a runtime has allocated what it needs; peak memory is read after them
SETTLE_QUERIES = 3  # untimed, after each change of model: they refill the caches that the other model emptied
HOT_SAMPLES_BYTES = 32 << 20  # inputs held in memory and drawn from; more than a cache, less than a small board has


class AgentError(Exception):
    """Something the person who asked can act on: printed without a traceback."""


class Worker:
    """Loads one engine and does what the conductor asks: each public method is a command, its result the reply."""

    def __init__(self, name: str, folder: str, runner: str, samples: str) -> None:
        self.name, self.folder, self.runner_file, self.samples_file = name, folder, runner, samples
        self._rows = []  # type: list[Any]
        self._logits = []  # type: list[Any]

    def load(self) -> dict[str, Any]:
        """Import the runtime, load the engine, and keep inputs ready in memory."""
        import numpy as np

        samples = np.load(self.samples_file, mmap_mode="r", allow_pickle=False)
        before = memory_bytes("VmRSS")
        started = time.perf_counter()
        spec = importlib.util.spec_from_file_location("runner", self.runner_file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        imported = time.perf_counter()
        runner = module.load(self.folder)
        loaded = time.perf_counter()
        self.run = runner.run
        for _ in range(FIRST_QUERIES):
            logits = self.run(np.array(samples[:1]))
        if getattr(logits, "ndim", 0) != 2 or len(logits) != 1:
            raise AgentError(f"answers {getattr(logits, 'shape', type(logits))} for one sample, not logits [1, K]")
        peak = memory_bytes("VmHWM")
        hot = max(1, min(len(samples), HOT_SAMPLES_BYTES // samples[:1].nbytes))
        self.samples = samples
        self.inputs = [np.array(samples[index : index + 1]) for index in range(hot)]
        gc.collect()
        gc.disable()
        return {
            "facts": runner.facts,
            "import_ms": 1e3 * (imported - started),
            "load_ms": 1e3 * (loaded - imported),
            "rss_before_load_bytes": before,
            "peak_rss_bytes": peak,
        }

    def warm_up(self) -> dict[str, Any]:
        """Run until three windows in a row agree: the clocks and the runtime's caches have then settled."""
        first = self._time([0])
        per_window = max(3, int(WARMUP_WINDOW_S * 1e9 / max(1, first[0][1])))
        medians = []  # type: list[int]
        deadline = time.perf_counter() + WARMUP_CAP_S
        stable = False
        while not stable and (time.perf_counter() < deadline or len(medians) < 3):
            stamps = self._time([index % len(self.inputs) for index in range(per_window)])
            medians.append(sorted(duration for _, duration in stamps)[per_window // 2])
            last = medians[-3:]
            stable = len(last) == 3 and max(last) <= (1 + WARMUP_TOLERANCE) * min(last)
        return {"warmup_n": 1 + per_window * len(medians), "warmup_stable": stable, "median_ns": medians[-1]}

    def block(self, launch: int, block: int, queries: int, seed: int) -> dict[str, Any]:
        """Time `queries` samples drawn with replacement by `seed`, one after the other."""
        import numpy as np

        order = np.random.RandomState(seed).randint(len(self.inputs), size=queries + SETTLE_QUERIES).tolist()
        self._time(order[:SETTLE_QUERIES])
        stamps = np.array(self._time(order[SETTLE_QUERIES:]), np.int64)
        self._rows.append(np.insert(stamps, [0], [launch, block], axis=1))
        return {}

    def _time(self, order: list[int]) -> list[tuple[int, int]]:
        """(start, duration) in ns of one query per index in `order`."""
        run, inputs, clock = self.run, self.inputs, time.perf_counter_ns
        stamps = []
        for index in order:
            x = inputs[index]
            start = clock()
            run(x)
            stamps.append((start, clock() - start))
        return stamps

    def classify(self, start: int, stop: int) -> dict[str, Any]:
        """Logits of the samples start..stop, one by one as they are timed: what is timed is what is scored."""
        import numpy as np

        for index in range(start, stop):
            self._logits.append(np.array(self.run(np.array(self.samples[index : index + 1]))[0], np.float32))
        return {}

    def save(self, latency_file: str) -> dict[str, Any]:
        """Write the latencies, and the logits if there are any."""
        import numpy as np

        np.save(latency_file, np.concatenate(self._rows))
        if self._logits:
            np.save(self.name + "_logits.npy", np.stack(self._logits))
        return {}


def memory_bytes(field: str) -> int | None:
    """VmRSS or its peak VmHWM of this process. Not ru_maxrss, which begins with that of the process that forked us."""
    lines = [line for line in read("/proc/self/status").split("\n") if line.startswith(field)]
    return 1024 * int(lines[0].split()[1]) if lines else None


def work(model: dict[str, str], samples: str) -> None:
    """Serve the conductor: a JSON command per line on standard input, a JSON reply per line on standard output."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a runtime that prints must not print into the replies
    worker = Worker(model["name"], model["folder"], model["runner"], samples)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            reply = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            if not isinstance(error, AgentError):
                traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")

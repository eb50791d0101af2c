"""One model in one process: load it, warm it up, time it, score it."""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any, Callable

from .errors import AgentError
from .pictures import Pictures
from .sensors import read

WARMUP_WINDOW_S = 0.03  # long enough that one scheduler tick does not move the window's median
WARMUP_TOLERANCE = 0.03  # three windows in a row within 3 % of each other: the clocks have settled
WARMUP_CAP_S = 3.0  # a machine that has not settled by then will not; the result then says so
FIRST_QUERIES = 3  # queries until a runtime has allocated what it needs; peak memory is read after them
SETTLE_SAMPLES = 3  # untimed, after each change of model: they refill the caches that the other model emptied
HOT_SAMPLES_BYTES = 32 << 20  # inputs held in memory and drawn from; more than a cache, less than a small board has


class Worker:
    """Loads one engine and does what the conductor asks: each public method is a command, its result the reply."""

    def __init__(self, name: str, folder: str, runner: str, samples: str) -> None:
        self.name, self.folder, self.runner_file, self.samples_file = name, folder, runner, samples
        self.batched = True
        self._rows = []  # type: list[Any]
        self._end_to_end = []  # type: list[Any]
        self._logits = []  # type: list[Any]

    def load(self, pictures: dict[str, Any] | None) -> dict[str, Any]:
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
        if getattr(logits, "ndim", 0) < 2 or len(logits) != 1:
            raise AgentError(f"answers {getattr(logits, 'shape', type(logits))} for one sample, not logits [1, K, ...]")
        peak = memory_bytes("VmHWM")
        hot = max(1, min(len(samples), HOT_SAMPLES_BYTES // samples[:1].nbytes))
        self.samples = samples
        self.hot = np.array(samples[:hot])
        self.pictures = Pictures(pictures) if pictures else None
        gc.collect()
        gc.disable()
        return {
            "facts": runner.facts,
            "import_ms": 1e3 * (imported - started),
            "load_ms": 1e3 * (loaded - imported),
            "rss_before_load_bytes": before,
            "peak_rss_bytes": peak,
            "answer_bytes": logits.size * 4,
            "decoder": self.pictures.decoder if self.pictures else "",
        }

    def warm_up(self, samples: int) -> dict[str, Any]:
        """Run until three windows in a row agree: the clocks and the runtime's caches have then settled. Every query is
        one of `samples` samples, as one batch where the engine takes batches."""
        if samples > 1 and self.batched:
            self._try_batch(samples)
        return self._settled(self._time, self._inputs(samples))

    def warm_up_end_to_end(self) -> dict[str, Any]:
        """The same with pictures, from their bytes to the answer."""
        assert self.pictures is not None
        return self._settled(self._time_end_to_end, self.pictures.stored)

    def _settled(self, ask: Callable[[list[Any]], list[Any]], inputs: list[Any]) -> dict[str, Any]:
        first = ask(inputs[:1])
        per_window = max(3, int(WARMUP_WINDOW_S * 1e9 / max(1, first[0][1])))
        medians = []  # type: list[int]
        deadline = time.perf_counter() + WARMUP_CAP_S
        stable = False
        while not stable and (time.perf_counter() < deadline or len(medians) < 3):
            stamps = ask([inputs[index % len(inputs)] for index in range(per_window)])
            medians.append(sorted(stamp[1] for stamp in stamps)[per_window // 2])
            last = medians[-3:]
            stable = len(last) == 3 and max(last) <= (1 + WARMUP_TOLERANCE) * min(last)
        queries = 1 + per_window * len(medians)
        return {"queries": queries, "stable": stable, "median_ns": medians[-1], "batched": self.batched}

    def _inputs(self, samples: int) -> list[Any]:
        """Batches of so many samples in a row; all lie in the same memory."""
        import numpy as np

        while len(self.hot) < samples:
            self.hot = np.concatenate([self.hot, self.hot])
        return [self.hot[first : first + samples] for first in range(len(self.hot) - samples + 1)]

    def _try_batch(self, samples: int) -> None:
        """An engine that was compiled for one sample answers a query of several one after the other."""
        import numpy as np

        run = self.run
        try:
            self.batched = len(run(self._inputs(samples)[0])) == samples
        except Exception:  # each runtime has its own
            self.batched = False
        if not self.batched:
            self.run = lambda x: np.concatenate([run(x[index : index + 1]) for index in range(len(x))])

    def block(self, launch: int, block: int, queries: int, seed: int, samples: int, every_ns: int) -> dict[str, Any]:
        """Time `queries` queries of `samples` samples drawn with replacement by `seed`: one after the other, or as they
        arrive, one `every_ns`."""
        import numpy as np

        settle, inputs = -(-SETTLE_SAMPLES // samples), self._inputs(samples)
        order = [inputs[index] for index in np.random.RandomState(seed).randint(len(inputs), size=queries + settle)]
        self._time(order[:settle])
        stamps = self._arriving(order[settle:], every_ns) if every_ns else self._time(order[settle:])
        self._rows.append(np.insert(np.array(stamps, np.int64), [0, 0, 2], [launch, block, samples], axis=1))
        return {"answered": samples * (queries + settle)}

    def _time(self, order: list[Any]) -> list[tuple[int, int, int]]:
        """(start, duration, 0) in ns of one query per input of `order`."""
        run, clock = self.run, time.perf_counter_ns
        stamps = []
        for x in order:
            start = clock()
            run(x)
            stamps.append((start, clock() - start, 0))
        return stamps

    def _arriving(self, order: list[Any], every_ns: int) -> list[tuple[int, int, int]]:
        """(arrival, from there to the answer, of which waited) in ns. Who arrives while another is answered waits; who
        arrives later than that wakes this process, as a camera would: that counts too."""
        run, clock, sleep = self.run, time.perf_counter_ns, time.sleep
        stamps = []
        due = clock() + every_ns
        for x in order:
            early = due - clock()
            if early > 0:
                sleep(early / 1e9)
            start = clock()
            run(x)
            stamps.append((due, clock() - due, start - due))
            due += every_ns
        return stamps

    def block_end_to_end(self, launch: int, block: int, queries: int, seed: int) -> dict[str, Any]:
        """Time `queries` pictures drawn with replacement by `seed`, from their bytes to the answer."""
        import numpy as np

        assert self.pictures is not None
        stored = self.pictures.stored
        order = [stored[i] for i in np.random.RandomState(seed).randint(len(stored), size=queries + SETTLE_SAMPLES)]
        self._time_end_to_end(order[:SETTLE_SAMPLES])
        stamps = np.array(self._time_end_to_end(order[SETTLE_SAMPLES:]), np.int64)
        self._end_to_end.append(np.insert(np.delete(stamps, 1, axis=1), [0, 0], [launch, block], axis=1))
        return {"answered": queries + SETTLE_SAMPLES}

    def _time_end_to_end(self, order: list[bytes]) -> list[tuple[int, ...]]:
        """(start, duration, and its parts: decode, resize, normalise, infer, argmax) in ns of one after the other."""
        assert self.pictures is not None
        decode, resize, normalise = self.pictures.decode, self.pictures.resize, self.pictures.normalise
        run, clock = self.run, time.perf_counter_ns
        stamps = []  # type: list[tuple[int, ...]]
        for data in order:
            start = clock()
            picture = decode(data)
            decoded = clock()
            pixels = resize(picture)
            resized = clock()
            x = normalise(pixels)
            normalised = clock()
            logits = run(x)
            inferred = clock()
            logits.argmax(1)
            end = clock()
            parts = (decoded - start, resized - decoded, normalised - resized, inferred - normalised, end - inferred)
            stamps.append((start, end - start, *parts))  # the duration is where `_settled` looks for it
        return stamps

    def classify(self, start: int, stop: int) -> dict[str, Any]:
        """Logits of the samples start..stop, one by one as they are timed: what is timed is what is scored."""
        import numpy as np

        for index in range(start, stop):
            self._logits.append(np.array(self.run(np.array(self.samples[index : index + 1]))[0], np.float32))
        return {}

    def save(self, latency: str, end_to_end: str = "") -> dict[str, Any]:
        """Write the latencies into these files, and the logits if there are any."""
        import numpy as np

        np.save(latency, np.concatenate(self._rows))
        if end_to_end:
            np.save(end_to_end, np.concatenate(self._end_to_end))
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

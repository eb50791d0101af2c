"""What each launch of a benchmark gave, on disk as soon as it is over: an interrupted benchmark goes on behind it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from typing import Any


class Launches:
    """The finished launches of the benchmark in this folder; those of another spec do not count."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.names = [model["name"] for model in spec["models"]]
        self.kinds = ["latency", "end_to_end"] if spec["pictures"] else ["latency"]
        self.spec_sha256 = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        self.run = time.time_ns()
        self.done = []  # type: list[dict[str, Any]]
        while self._finished():
            with open(self._file()) as file:
                self.done.append(json.load(file))

    def _file(self) -> str:
        return f"launch_{len(self.done)}.json"

    def files(self, name: str, launch: int) -> dict[str, str]:
        """Where the tables of one model in one launch are, by their kind."""
        return {kind: f"{name}_{kind}_{launch}.npy" for kind in self.kinds}

    def _finished(self) -> bool:
        """Whether the next launch is here, whole: a power cut may leave files without their content."""
        import numpy as np

        try:
            with open(self._file()) as file:
                ours = json.load(file)["spec_sha256"] == self.spec_sha256
            for name in self.names:
                for file_name in self.files(name, len(self.done)).values():
                    np.load(file_name, allow_pickle=False)
            return bool(ours)
        except (OSError, ValueError, EOFError, KeyError):
            return False

    @property
    def seconds(self) -> float:
        """From the start of the benchmark to the end of the last launch, without the time between two runs."""
        return float(self.done[-1]["ended_s"]) if self.done else 0.0

    @property
    def measured_s(self) -> float:
        """Of these, spent in timed rounds."""
        return float(self.done[-1]["measured_s"]) if self.done else 0.0

    def add(self, models: dict[str, Any], telemetry: list[dict[str, Any]], started: float, measured_s: float) -> None:
        """Keep a launch whose latencies are written; `started` is the benchmark's start on the clock of this run."""
        launch = {
            "spec_sha256": self.spec_sha256,
            "run": self.run,
            "started_ns": int(started * 1e9),
            "ended_s": time.perf_counter() - started,
            "measured_s": measured_s,
            "models": models,
            "telemetry": telemetry,
        }
        with open("launch.part", "w") as file:
            json.dump(launch, file)
        os.replace("launch.part", self._file())
        self.done.append(launch)

    def forget(self) -> None:
        """Count none of them again: the benchmark is over, and the next one in this folder measures anew. The last one
        goes first: who is stopped halfway leaves the start of a benchmark, not an end to be joined with another."""
        while self.done:
            self.done.pop()
            os.remove(self._file())

    def join(self) -> dict[str, Any]:
        """Write one file of each kind per model, its clock starting with the benchmark; return the rest together."""
        import numpy as np

        for name in self.names:
            for kind in self.kinds:
                tables = []
                for number, launch in enumerate(self.done):
                    table = np.load(self.files(name, number)[kind], allow_pickle=False)
                    table[:, 2] -= launch["started_ns"]
                    tables.append(table)
                np.save(f"{name}_{kind}.npy", np.concatenate(tables))
        return {
            "models": {name: [launch["models"][name] for launch in self.done] for name in self.names},
            "telemetry": [row for launch in self.done for row in launch["telemetry"]],
            "interruptions": len({launch["run"] for launch in self.done}) - 1,
        }

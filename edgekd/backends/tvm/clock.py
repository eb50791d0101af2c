"""Times what was compiled: in this process, or on a board that TVM's RPC tracker lends."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, rpc, tirx
from tvm.support import cc

from edgekd.backends.tvm.processor import Processor

# A turn of one candidate lasts about this long: what disturbs the machine then disturbs few of them.
TURN_S = 0.0005
TURNS, ENGINE_TURNS = 9, 101
CONNECT_S = 10.0


class Clock:
    """Times on this machine, for which the code must be."""

    def __init__(self, processor: Processor) -> None:
        self.processor, self.device = processor, tvm.cpu()

    def kernels(self, functions: Sequence[Any]) -> list[float]:
        """Seconds that each of these scheduled functions takes, all of which compute the same.

        They take turns, and the fastest turn counts: nothing makes a kernel faster than it is.
        """
        named = {f"kernel_{at}": function for at, function in enumerate(functions)}
        module = tvm.IRModule({name: one.with_attr("global_symbol", name) for name, one in named.items()})
        library = self._loaded(tvm.compile(module, target=self.processor.target()))
        timers = [self._timer(library, name, self._values(functions[0])) for name in named]
        calls = max(1, round(TURN_S / timers[0](1)))
        turns = [[timer(calls) for timer in timers] for _ in range(TURNS)]
        return [min(turn) for turn in zip(*turns, strict=True)]

    def engines(self, executables: Sequence[Any], shape: Sequence[int]) -> list[list[float]]:
        """Seconds of every engine, by turn, for images of this shape."""
        x = tvm.runtime.tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32), self.device)
        timers = []
        for executable in executables:
            machine = self._machine(executable)
            machine.save_function("main", "timed", x, include_return=False)
            timers.append(self._timer(machine.module, "timed", []))
        calls = max(1, round(TURN_S / max(timer(1) for timer in timers)))
        turns = []
        for turn in range(ENGINE_TURNS):
            seconds = {at: timers[at](calls) for at in (range(len(timers)) if turn % 2 else range(len(timers))[::-1])}
            turns.append([seconds[at] for at in range(len(timers))])
        return turns

    def _loaded(self, executable: Any) -> Any:
        return executable.jit()

    def _machine(self, executable: Any) -> Any:
        return relax.VirtualMachine(executable, self.device)

    def _timer(self, library: Any, name: str, values: list[Any]) -> Callable[[int], float]:
        def seconds(calls: int) -> float:
            return float(library.time_evaluator(name, self.device, number=calls, repeat=1)(*values).mean)

        seconds(1)  # the first call finds nothing in the caches
        return seconds

    def _values(self, function: Any) -> list[Any]:
        """What to call it with: one image, where the number of images is open."""
        random, values = np.random.default_rng(0), []
        for parameter in function.params:
            shape = [int(size) if isinstance(size, tirx.IntImm) else 1 for size in parameter.shape]
            values.append(tvm.runtime.tensor(random.standard_normal(shape).astype(str(parameter.dtype)), self.device))
        return values


class BoardClock(Clock):
    """Times on a board: each library is linked here, uploaded and loaded there."""

    def __init__(self, processor: Processor, tracker: str, linker: str) -> None:
        """tracker: HOST:PORT/KEY; linker: empty is this machine's own.

        Raises ValueError when no board can be had there.
        """
        super().__init__(processor)
        self.linker, self.loaded = linker, 0
        address, _, key = tracker.partition("/")
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), CONNECT_S).close()  # TVM itself would try for a minute
            self.session = rpc.connect_tracker(host, int(port)).request(key, session_timeout=0)
        except (RuntimeError, ValueError, OSError) as error:
            raise ValueError(f"the tracker {tracker} lends no board: {error}") from error
        self.device = self.session.cpu(0)

    def _loaded(self, executable: Any) -> Any:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            self.loaded += 1  # the board has loaded the file of the last name, which must not change
            library = Path(folder, f"timed{self.loaded}.so")
            executable.export_library(str(library), fcompile=cc.cross_compiler(self.linker) if self.linker else None)
            self.session.upload(str(library))
        return self.session.load_module(library.name)

    def _machine(self, executable: Any) -> Any:
        return relax.VirtualMachine(self._loaded(executable), self.device)

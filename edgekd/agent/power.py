"""Power and energy by rail: INA3221 and INA238 monitors on Jetsons, RAPL counters on x86."""

from __future__ import annotations

import glob
import os
import threading
import time
from typing import Any, Tuple

from .sensors import number, read

SAMPLES_PER_S = 20.0  # an INA3221 needs some milliseconds for a reading of all its rails
SETTLE_S = 0.015  # after a model's turn has begun: the monitor's average still holds the other model's power
NOT_CONNECTED = ("", "NC")


# A sensor's name; the files whose values, multiplied with each other and this factor, are mW.
Monitor = Tuple[str, Tuple[str, ...], float]


class Rails:
    """The supply rails of this machine whose power or energy can be read."""

    def __init__(self, root: str = "/") -> None:
        self._monitors = {}  # type: dict[str, Monitor]
        self._counters = {}  # type: dict[str, tuple[str, int]]
        for chip in sorted(glob.glob(os.path.join(root, "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*"))):
            for channel in "123":
                files = (os.path.join(chip, f"in{channel}_input"), os.path.join(chip, f"curr{channel}_input"))  # mV, mA
                self._add(read(os.path.join(chip, f"in{channel}_label")), ("ina3221", files, 1e-3))
        for chip in sorted(glob.glob(os.path.join(root, "sys/bus/i2c/drivers/ina3221x/*/iio:device*"))):
            for channel in "012":
                name, file = (os.path.join(chip, text.format(channel)) for text in ("rail_name_{}", "in_power{}_input"))
                self._add(read(name), ("ina3221", (file,), 1.0))
        # A Jetson Thor's, of the whole board; its kernel's driver knows no names.
        for chip in sorted(glob.glob(os.path.join(root, "sys/bus/i2c/drivers/ina238/*/hwmon/hwmon*"))):
            self._add(
                read(os.path.join(chip, "label")) or "VIN", ("ina238", (os.path.join(chip, "power1_input"),), 1e-3)
            )
        for zone in sorted(glob.glob(os.path.join(root, "sys/class/powercap/intel-rapl:*"))):
            path, name = os.path.join(zone, "energy_uj"), read(os.path.join(zone, "name"))
            if name and number(read(path)) is not None:  # readable by root alone, on most systems
                self._counters[name] = (path, number(read(os.path.join(zone, "max_energy_range_uj"))) or 0)

    def _add(self, name: str, monitor: Monitor) -> None:
        if name not in NOT_CONNECTED and self._milliwatts(monitor) is not None:
            self._monitors[name] = monitor

    def names(self) -> list[str]:
        """The rails, with the kind of sensor."""
        return [f"{name} ({self.sensor(name)})" for name in [*self._monitors, *self._counters]]

    def sensor(self, name: str) -> str:
        """What measures a rail."""
        return self._monitors[name][0] if name in self._monitors else "rapl"

    def power_mw(self) -> dict[str, float]:
        """What the monitors read now."""
        found = {name: self._milliwatts(monitor) for name, monitor in self._monitors.items()}
        return {name: value for name, value in found.items() if value is not None}

    def energy_mj(self) -> dict[str, float]:
        """What the counters read now."""
        return {name: (number(read(path)) or 0) / 1000 for name, (path, _) in self._counters.items()}

    def wrap_mj(self, name: str) -> float:
        """Where a counter begins anew."""
        return self._counters[name][1] / 1000

    @staticmethod
    def _milliwatts(monitor: Monitor) -> float | None:
        _, files, product = monitor
        for file in files:
            value = number(read(file))
            if value is None:
                return None
            product *= value
        return product


# A model, and the number of the turn in the spec's list.
Taker = Tuple[str, int]


class Meter:
    """Energy by model and kind of turn: who is on turn is told by `begin` and `end`.

    A counter is read at both. A monitor shows power of the moment only, so that a thread reads it while a model is on
    turn; its mean times the time on turn is the energy. The thread runs in the conductor, which only waits meanwhile.
    """

    def __init__(self, rails: Rails) -> None:
        self.rails = rails
        self._turn = None  # type: tuple[Taker, float] | None
        self._seconds = {}  # type: dict[Taker, float]
        self._samples = {}  # type: dict[Taker, int]
        self._read = {}  # type: dict[Taker, dict[str, list[float]]]
        self._counted = {}  # type: dict[Taker, dict[str, float]]
        self._before = {}  # type: dict[str, float]
        self._newest = {}  # type: dict[str, float]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if rails.power_mw():
            self._thread.start()

    def begin(self, model: str, turn: int) -> None:
        """A model starts to run."""
        self._before = self.rails.energy_mj()
        self._turn = (model, turn), time.perf_counter()

    def end(self, samples: int) -> None:
        """It has answered so many samples."""
        assert self._turn is not None
        taker, since = self._turn
        self._turn = None
        self._seconds[taker] = self._seconds.get(taker, 0.0) + time.perf_counter() - since
        self._samples[taker] = self._samples.get(taker, 0) + samples
        counted = self._counted.setdefault(taker, {})
        for name, now in self.rails.energy_mj().items():
            used = now - self._before[name]
            counted[name] = counted.get(name, 0.0) + (used if used >= 0 else used + self.rails.wrap_mj(name))

    def power_mw(self) -> dict[str, float]:
        """The newest reading of each monitor."""
        return dict(self._newest)

    def close(self) -> None:
        """Stop reading."""
        self._over.set()
        if self._thread.ident:
            self._thread.join()

    def of(self, model: str) -> list[dict[str, Any]]:
        """What a model's samples took: a row by turn and rail."""
        return [row for taker in self._seconds if taker[0] == model for row in self._rows(taker)]

    def _rows(self, taker: Taker) -> list[dict[str, Any]]:
        seconds, samples = self._seconds[taker], self._samples[taker]
        rows = [
            {"rail": rail, "sensor": self.rails.sensor(rail), "mj": seconds * sum(mw) / len(mw), "readings": len(mw)}
            for rail, mw in self._read.get(taker, {}).items()
        ]
        rows += [
            {"rail": rail, "sensor": self.rails.sensor(rail), "mj": mj, "readings": samples}
            for rail, mj in self._counted.get(taker, {}).items()
        ]
        return [dict(row, turn=taker[1], samples=samples, seconds=seconds) for row in rows]

    def _watch(self) -> None:
        while not self._over.wait(1 / SAMPLES_PER_S):
            turn = self._turn
            readings = self.rails.power_mw()
            self._newest = readings
            # The turn may have changed while the slow bus was read: such a reading is nobody's.
            if turn is not None and turn is self._turn and time.perf_counter() - turn[1] > SETTLE_S:
                for rail, mw in readings.items():
                    self._read.setdefault(turn[0], {}).setdefault(rail, []).append(mw)

"""Power and energy, from the files of boards that have monitors."""

from __future__ import annotations

import time

import board_files
import pytest

from edgekd.agent.power import Meter, Rails

RAIL = "sys/class/powercap/intel-rapl:0/energy_uj"


def test_rails_of_a_jetson(tmp_path):
    rails = Rails(str(board_files.write(tmp_path, board_files.JETSON_ORIN_NANO)))
    assert rails.power_mw() == pytest.approx(
        {"VDD_IN": 4968 * 1520 / 1000, "VDD_CPU_GPU_CV": 4960 * 1784 / 1000, "VDD_SOC": 4960 * 496 / 1000}
    )
    assert rails.energy_mj() == {}


def test_rails_of_the_first_jetson_nano(tmp_path):
    rails = Rails(str(board_files.write(tmp_path, board_files.JETSON_NANO)))
    assert rails.power_mw() == {"POM_5V_IN": 1992, "POM_5V_GPU": 40, "POM_5V_CPU": 396}


def test_a_jetson_thor_tells_the_power_of_the_whole_board(tmp_path):
    """In microwatts; the row of the energy names the sensor."""
    rails = Rails(str(board_files.write(tmp_path, board_files.JETSON_AGX_THOR)))
    assert (rails.names(), rails.power_mw()) == (["VIN (ina238)"], {"VIN": pytest.approx(31_588.2)})
    assert rails.sensor("VIN") == "ina238"


def test_rails_that_are_not_connected_are_left_out(tmp_path):
    files = board_files.JETSON_ORIN_NANO | {f"{board_files.INA3221}in1_label": "NC"}
    assert set(Rails(str(board_files.write(tmp_path, files))).power_mw()) == {"VDD_CPU_GPU_CV", "VDD_SOC"}


def test_counters_of_an_x86_machine(tmp_path):
    rails = Rails(str(board_files.write(tmp_path, board_files.RAPL_MACHINE)))
    assert rails.names() == ["package-0 (rapl)", "core (rapl)"]
    assert rails.energy_mj()["package-0"] == pytest.approx(240_422_366.267)


def test_energy_between_two_readings_of_a_counter_that_begins_anew(tmp_path):
    meter = Meter(Rails(str(board_files.write(tmp_path, board_files.RAPL_MACHINE))))
    for queries, before, after in ((10, 1_000, 51_000), (20, 262_143_320_000, 91_150)):
        (tmp_path / RAIL).write_text(str(before))
        meter.begin("student", 0)
        (tmp_path / RAIL).write_text(str(after))
        meter.end(queries)
    meter.close()
    package, _ = meter.of("student")
    # 50 mJ, then 8.85 mJ to the end of the counter and 91.15 from its start.
    assert package["mj"] == pytest.approx(50 + (262_143_328.850 - 262_143_320) + 91.15)
    assert (package["rail"], package["sensor"], package["samples"]) == ("package-0", "rapl", 30)


def test_energy_by_a_monitor_is_its_mean_times_the_time_on_turn(tmp_path):
    meter = Meter(Rails(str(board_files.write(tmp_path, board_files.JETSON_ORIN_NANO))))
    volts, amperes = (tmp_path / f"{board_files.INA3221}{name}1_input" for name in ("in", "curr"))
    volts.write_text("5000")
    for model, current in (("student", "1000"), ("teacher", "3000")):
        amperes.write_text(current)
        meter.begin(model, 0)
        time.sleep(0.4)
        meter.end(100)
    meter.close()
    for model, mw in (("student", 5000), ("teacher", 15000)):
        row = next(row for row in meter.of(model) if row["rail"] == "VDD_IN")
        assert row["mj"] == pytest.approx(mw * row["seconds"])
        assert row["readings"] >= 1
        assert 0.4 <= row["seconds"] < 4
    assert meter.power_mw()["VDD_IN"] == pytest.approx(15000)


def test_a_machine_without_monitors_has_no_rows(tmp_path):
    meter = Meter(Rails(str(tmp_path)))
    meter.begin("student", 0)
    meter.end(1)
    meter.close()
    assert meter.of("student") == []
    assert meter.power_mw() == {}

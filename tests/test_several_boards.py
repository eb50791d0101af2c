"""One recipe on several boards: what is shared is made once, and what becomes of one board is its own affair."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_job import TINY
from waiting import wait_until

from edgekd.cli import boards
from edgekd.errors import BoardFailed, BudgetMissed, EdgekdError, ResultInvalid

NOBODY = "ssh://nobody@127.0.0.1:1"
DEVICES = f"""\
devices:
  here: {{url: "local:?python={sys.executable}", target: ./own.yaml}}
  bare: {{url: "local:?python=/nonexistent"}}
  gone: {{url: "{NOBODY}"}}
"""
OWN = "name: own\nbackends: [onnxruntime]\n"


@pytest.fixture
def place(done, tiny):
    """A folder with the tiny recipe and an inventory."""
    (tiny / "devices.yaml").write_text(DEVICES)
    (tiny / "own.yaml").write_text(OWN)
    return tiny


def test_a_board_that_fails_does_not_take_the_others_down(own_done, place, main):
    store = ["--store", own_done.store]
    code, out, err = main(
        "bench", "tiny.yaml", *store, "--device", "here", "--device", "local:", "--device", NOBODY, "--json"
    )
    document = json.loads(out)
    rows = {row["name"]: row for row in document["boards"]}
    assert (code, document["status"]) == (3, "FAILED")
    assert {name: row["target"] for name, row in rows.items()} == {
        "here": "own", "local": "local", "nobody-127-0-0-1-1": "local",
    }  # fmt: skip
    for name in ("here", "local"):
        assert rows[name]["status"] in ("VALID", "INVALID")
        assert rows[name]["speedup"]["value"] > 0 and rows[name]["n"] == 50
        assert (own_done.store / "runs" / document["run_id"] / rows[name]["report"]).is_file()
    gone = rows["nobody-127-0-0-1-1"]
    assert gone["reasons"] == [f'device "{NOBODY}": nobody listens there: the connection is refused']
    assert err.count("bench            done in") == 2
    assert "error: nobody-127-0-0-1-1 was not measured: device" in err
    assert "1 of 3 boards failed, all in " in err
    assert err.startswith(f'nobody-127-0-0-1-1     left out: device "{NOBODY}": ')
    line = f"edgekd bench tiny.yaml --device here --device local: --device {NOBODY}"
    assert document["command"] == line
    # The same again from what was recorded; each board's run is one like any other, but none of the newest.
    code, out, _ = main("report", *store, "--json")
    assert (code, json.loads(out)) == (0, document)
    code, out, _ = main("report", rows["here"]["run_id"], *store, "--json")
    own = json.loads(out)
    assert own["command"] == f"edgekd bench tiny.yaml --target ./own.yaml --device 'local:?python={sys.executable}'"
    assert own["latency"]["student"]["p50_ms"] == rows["here"]["student_p50_ms"]


def test_boards_that_all_fail_alike_give_their_exit_code(own_done, place, main):
    code, out, err = main(
        "bench", "tiny.yaml", "--store", own_done.store, "--device", "gone", "--device", "ssh://x@127.0.0.1:1"
    )
    assert code == 3
    assert "FAILED: 0 of 2 boards measured" in out
    assert "error: gone was not measured: " in err


def test_a_plan_for_each(own_done, place, main):
    given = ["tiny.yaml", "--store", own_done.store, "--device", "here", "--device", "local:", "--dry-run"]
    code, out, _ = main("run", *given, "--json")
    plans = json.loads(out)
    assert code == 0
    assert {name: [one["action"] for one in plan][-1] for name, plan in plans.items()} == {
        "here": "run",
        "local": "run",
    }
    assert plans["here"][:3] == plans["local"][:3]
    assert "here, own:\n" in main("run", *given)[1]


def test_the_command_line_wins_over_the_inventory(own_done, place, main):
    given = ["--store", own_done.store, "--target", "local", "--device", "here", "--dry-run", "--json"]
    (only,) = [one for one in json.loads(main("run", "tiny.yaml", *given)[1]) if one["stage"] == "engine-student"]
    assert only["action"] == "reuse"


def test_a_command_that_takes_one_device(place, main):
    code, _, err = main("compile", "tiny.yaml", "--device", "all")
    assert code == 2
    assert err.split("\n")[:3] == [
        "error: edgekd compile takes one device, and 3 are named",
        "       several devices are for edgekd bench and edgekd run",
        "fix:   leave --device out, and name the target: --target TARGET",
    ]


def a_row(**changes):
    return SimpleNamespace(**{"name": "a", "url": "local:", "status": "VALID", "reasons": [], "missed": []} | changes)


@pytest.mark.parametrize(
    ("rows", "failures", "kind", "code"),
    [
        ([a_row()], {}, None, 0),
        ([a_row(missed=["speedup"])], {}, BudgetMissed, 5),
        ([a_row(missed=["speedup"]), a_row(status="INVALID", reasons=["hot"])], {}, ResultInvalid, 6),
        ([a_row(status="INVALID", reasons=["hot"])], {"b": 3}, BoardFailed, 3),
        ([a_row()], {"b": 3, "c": 3}, BoardFailed, 3),
        ([a_row()], {"b": 3, "c": 4}, BoardFailed, 4),
    ],
)
def test_the_exit_code_of_several(rows, failures, kind, code):
    errors = {name: EdgekdError("it is gone") for name in failures}
    for name, error in errors.items():
        error.exit_code = failures[name]
    if kind is None:
        return boards._judge(SimpleNamespace(boards=rows), Path("report.html"), errors)
    with pytest.raises(kind) as caught:
        boards._judge(SimpleNamespace(boards=rows), Path("report.html"), errors)
    assert caught.value.exit_code == code


@pytest.mark.parametrize(
    ("out", "what"),
    [
        ('{"error": {"what": "a", "allowed": "b", "fix": "c"}, "exit_code": 4}', "a"),
        ("", "its process ended with exit status 4"),
        ("[]", "its process ended with exit status 4"),
        ('{"error": "', "its process ended with exit status 4"),
    ],
)
def test_why_a_boards_process_has_no_report(out, what):
    error = boards._failure(out, 4)
    assert (error.what, error.exit_code) == (what, 4)
    assert boards._failure("", 6) is None


def processes_of(run):
    """Processes that measure on one board of a run."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"--run-id\0{run}/".encode() in file.read_bytes():
                found.append(int(file.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_the_boards_processes_go_with_us(own_done, place, edgekd, number, status):
    runs = own_done.store / "runs"
    before = set(os.listdir(runs))
    (place / "tiny.yaml").write_text(TINY.replace("seconds: 0.1", "seconds: 100"))
    given = ["--store", own_done.store, "--device", "here", "--device", "local:"]
    with edgekd.start("bench", "tiny.yaml", *given) as process:
        assert wait_until(lambda: list(runs.glob("*/*/run.json")) and set(os.listdir(runs)) - before, 100)
        (run,) = set(os.listdir(runs)) - before
        assert wait_until(lambda: len(processes_of(run)) == 2, 100)
        time.sleep(1)
        process.send_signal(number)
        assert process.wait(100) == status
    assert wait_until(lambda: not processes_of(run))

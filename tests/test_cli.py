"""The command line as its users meet it: what is printed where, exit codes, and what a bad line gets."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from command_line import error, stored, without
from tiny_job import TINY

import edgekd as package
from edgekd import cli, registry
from edgekd.cli import outcome
from edgekd.cli.looking import KINDS
from edgekd.errors import BudgetMissed, ResultInvalid

COMMANDS = (
    "bench", "calib", "check", "compile", "distill", "doctor", "eval", "export", "import", "init", "list", "plan",
    "quantize",
    "report", "run", "schema",
)  # fmt: skip


# --- what every user meets ----------------------------------------------------------------------------------------


def test_the_commands(main):
    code, out, err = main()
    assert (code, err) == (0, "") and out == main("--help")[1]
    listed = [line.split()[0] for line in out.partition("Commands:")[2].splitlines() if line.strip()]
    assert sorted(listed) == sorted(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_that_fits_a_terminal(command, main):
    code, out, _ = main(command, "--help")
    assert code == 0 and max(map(len, out.splitlines())) <= 80


def test_the_version(main):
    assert main("--version") == (0, f"edgekd {package.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (["lst"], ["error: edgekd: No such command 'lst'. Did you mean 'list'?", "fix:   see: edgekd --help"]),
        (["run", "--bogus"], ["error: edgekd run: No such option: --bogus", "fix:   see: edgekd run --help"]),
        (["run", "a", "b"], ["error: edgekd run: Got unexpected extra argument", "fix:   see: edgekd run --help"]),
        (["--bogus"], ["error: edgekd: No such option: --bogus", "fix:   see: edgekd --help"]),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_line_that_is_not_understood(main, arguments, lines):
    code, out, err = main(*arguments)
    assert (code, out) == (2, "") and error(err).startswith(lines[0])
    assert err.splitlines()[1:] == ["       the command line is not understood", lines[1]]


def test_quiet_and_verbose(main):
    assert main("run", "-q", "-v") == (
        2, "", "error: --quiet and --verbose exclude each other\n       expected: at most one\nfix:   leave one out\n",
    )  # fmt: skip


def test_a_fault_of_our_own(main, monkeypatch):
    def break_down():
        raise ZeroDivisionError("by nothing\nat all")

    monkeypatch.setattr(registry, "_table", break_down)
    assert main("list") == (
        1,
        "",
        "error: internal: ZeroDivisionError: by nothing\n"
        "       this is a fault of edgekd, not of yours\n"
        "fix:   run it again with --debug, and report what it prints\n",
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(["list", "--debug"])


def test_a_full_disk_outside_the_store_is_no_fault_of_ours(main, monkeypatch):
    def fill_up():
        raise OSError(errno.ENOSPC, "No space left on device", "/somewhere/file")

    monkeypatch.setattr(registry, "_table", fill_up)
    no_temporary_file(monkeypatch)
    assert main("list") == (
        4,
        "",
        "error: the disk is full: /somewhere/file cannot be written\n"
        "       temporary files are in /no/folder; TMPDIR names another folder\n"
        "fix:   free some space, then run again: what is finished is kept\n",
    )


def test_no_room_for_temporary_files_is_no_fault_of_ours(main, monkeypatch):
    monkeypatch.setattr(registry, "_table", tempfile.TemporaryDirectory)
    no_temporary_file(monkeypatch)
    assert main("list") == (
        4,
        "",
        "error: no temporary file can be written: the disk is full, or the folder is not yours to write\n"
        "       temporary files are in /no/folder; TMPDIR names another folder\n"
        "fix:   free some space, then run again: what is finished is kept\n",
    )


def no_temporary_file(monkeypatch):
    """As when every place for them is full."""
    monkeypatch.setenv("TMPDIR", "/no/folder")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/no/folder"])


def test_debug_shows_where_an_error_comes_from(main):
    code, _, err = main("plan", "nope.yaml", "--debug")
    assert code == 2 and "Traceback" in err and err.endswith("fix:   correct the path, or write one: edgekd init\n")
    assert "Traceback" not in main("plan", "nope.yaml")[2]


# --- list, schema, doctor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_list_fits_a_terminal_and_names_everything(kind, main, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "devices.yaml").write_text("devices:\n  pi: {url: ssh://pi@pi}\n")
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = main("list", kind)
    rows = json.loads(main("list", kind, "--json")[1])[kind]
    assert code == 0 and rows and out.splitlines()[0] == kind and max(map(len, out.splitlines())) <= 80
    for row in rows:
        assert f"\n  {row['name']} " in out and all(f"{option}=" in out for option in row["options"])
    assert main("list", kind.removesuffix("s"))[1] == out


def test_list_of_all_kinds(main):
    out = json.loads(main("list", "--json")[1])
    assert list(out) == list(KINDS)


def test_list_of_something_else(main):
    code, out, err = main("list", "netwrks")
    assert (code, out, error(err)) == (2, "", 'error: KIND = "netwrks" is not a known kind of thing')
    assert err.splitlines()[2] == 'fix:   use "networks", or see all: edgekd list'


def test_schema(main):
    assert json.loads(main("schema")[1])["title"] == "edgekd recipe"


def test_doctor(main, tiny):
    code, out, err = main("doctor", "--json")
    found = {row["what"]: row for row in json.loads(out)}
    assert (code, err) == (0, "") and not found["torch"]["fix"] and found["store"]["found"].startswith(f"{tiny}, ")
    assert main("doctor")[0] == 0
    assert sorted(os.listdir(tiny)) == ["tiny.yaml"], "looking leaves nothing behind"


# --- plan, report -------------------------------------------------------------------------------------------------


def test_plan(main, tiny, done):
    code, out, _ = main("plan", "tiny.yaml", "--store", done.store)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert code == 0 and [row[1] for row in rows] == ["reuse"] * 7 + ["run"]
    planned = json.loads(main("run", "tiny.yaml", "--store", done.store, "--dry-run", "--json")[1])
    told = [[one["stage"], one["action"], one["key"][:12]] for one in planned]
    assert told[:-1] == rows[:-1] and told[-1][:2] == rows[-1][:2]  # a benchmark's key is that of its second
    out = main("plan", "tiny.yaml", "--store", done.store, "--set", "seed=3")[1]
    assert "run, unless its new inputs turn out as before" in out


def test_a_dry_run_leaves_nothing_behind(main, tiny):
    assert main("run", "tiny.yaml", "--dry-run")[0] == 0
    assert sorted(os.listdir(tiny)) == ["tiny.yaml"]


def test_report_of_the_newest_and_of_an_older_run(main, tiny, own_done):
    from edgekd.artifact import Store

    store = Store(own_done.store)
    newer = {**store.recorded(own_done.run_id), "run_id": "20990101-newer"}
    store.record("20990101-newer", newer)
    for arguments, run_id in (((), "20990101-newer"), ((own_done.run_id,), own_done.run_id)):
        code, out, err = main("report", *arguments, "--store", own_done.store)
        assert (code, err) == (0, "") and Path(out.strip()) == own_done.store / "runs" / run_id / "report.html"
        assert Path(out.strip()).is_file()
    assert json.loads(main("report", "--store", own_done.store, "--json")[1])["run_id"] == "20990101-newer"
    code, out, err = main("report", "2026", "--store", own_done.store)
    assert (code, out, error(err)) == (2, "", 'error: run = "2026" is not a known run')


def test_report_without_a_run(main, tiny):
    code, out, err = main("report")
    assert (code, out, error(err)) == (2, "", "error: there is no run in .edgekd")


# --- json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "nope.yaml"], ["run", "tiny.yaml", "--set", "x"], ["run", "--bogus"],
        ["list", "nope"], ["report"], ["report", "--store", "tiny.yaml"], ["doctor", "--device", "nope:"],
        ["distill", "--target", "nope"],
        ["run", "tiny.yaml", "--store", "tiny.yaml", "-q"], ["bench", "tiny.yaml", "--device", "nope:"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_json_is_one_document_also_when_it_fails(main, tiny, arguments):
    code, out, err = main(*arguments, "--json")
    document = json.loads(out)
    assert document["exit_code"] == code > 1
    parts = document["error"]
    assert err == f"error: {parts['what']}\n       {parts['allowed']}\nfix:   {parts['fix']}\n"


def test_a_second_run_only_measures_and_its_json_is_the_report_also_when_the_verdict_is_bad(main, tiny, own_done):
    planned = [one["action"] for one in json.loads(main("plan", "tiny.yaml", "--store", own_done.store, "--json")[1])]
    code, out, err = main("run", "tiny.yaml", "--store", own_done.store, "--json", "--set", "budgets.speedup=1000")
    report, told = json.loads(out), [line.split() for line in err.splitlines() if line.startswith("[")]
    assert planned == ["reuse"] * 7 + ["run"]
    assert [line[2] for line in told[:7]] == ["reused"] * 7 and {line[1] for line in told[7:]} == {"bench"}
    assert report["verdict"]["budgets"][0]["met"] is False
    assert code in (BudgetMissed.exit_code, ResultInvalid.exit_code)  # this machine may be too busy for a valid one
    assert error("\n".join(err.splitlines()[-3:]))
    assert sorted(path.name for path in (own_done.store / "runs").iterdir()) == sorted(
        [own_done.run_id, report["run_id"]]
    )


# --- the verdict --------------------------------------------------------------------------------------------------


def judged(done, command: str = "edgekd bench", **verdict) -> Exception | None:
    from edgekd import pipeline
    from edgekd.artifact import Store
    from edgekd.report.assemble import document_from_run

    document = document_from_run(*pipeline.recorded(Store(done.store)))
    found = {"verdict": document.verdict.model_copy(update=verdict), "command": command}
    document = document.model_copy(update=found)
    try:
        outcome.judge(document, Path("report.html"))
    except Exception as problem:
        return problem
    return None


def test_a_missed_budget(done):
    from edgekd.report.document import Budget

    budgets = [
        Budget(name="accuracy_drop", limit=0.02, value=0.01, met=True),
        Budget(name="p99_ms", limit=5, value=7.125, met=False),
    ]
    problem = judged(done, status="VALID", reasons=[], budgets=budgets)
    assert isinstance(problem, BudgetMissed) and str(problem).splitlines() == [
        "error: budgets.p99_ms = 5 is missed: 7.125",
        "       1 of 2 budgets missed, all in report.html",
        "fix:   train longer, choose a larger student or another quantize.method, or relax the budget",
    ]


def test_an_invalid_result(done):
    problem = judged(done, status="INVALID", reasons=["too short", "too hot"])
    assert isinstance(problem, ResultInvalid) and str(problem).splitlines() == [
        "error: the measurement does not hold: too short",
        "       reasons: 2, all in report.html",
        "fix:   quiet the machine and measure again: edgekd bench",
    ]
    problem = judged(done, "edgekd import results.json", status="INVALID", reasons=["too hot"])
    assert problem.fix == "quiet the board, and run the kit there again: python3 run.py"


def test_a_good_result(done):
    assert judged(done, status="VALID", reasons=[], budgets=[]) is None


# --- what bad input gets: nothing half-written, no traceback ------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_a_pickle_with_code_is_refused(main, tiny):
    import torch

    torch.save({"weight": Evil()}, tiny / "evil.pt")
    code, out, err = main("distill", "tiny.yaml", "--set", "teacher.checkpoint=evil.pt", "-q")
    assert (code, out) == (4, "") and "would run the code in it" in error(err)
    assert not Path("ran").exists() and stored(tiny / ".edgekd") == []


def test_a_checkpoint_that_does_not_fit(main, tiny):
    import torch

    torch.save(torch.nn.Linear(3, 3).state_dict(), tiny / "other.pt")
    code, out, err = main("distill", "tiny.yaml", "--set", "teacher.checkpoint=other.pt", "-q")
    assert (code, out) == (4, "") and "other.pt: does not fit the network" in error(err)
    assert stored(tiny / ".edgekd") == []


def test_data_with_one_class(main, tiny):
    np.savez("one.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.zeros(20, np.int64))
    code, out, err = main("distill", "tiny.yaml", "--set", "data.source=npz", "--set", "data.path=one.npz", "-q")
    assert (code, out) == (4, "") and "one.npz" in error(err) and "class" in error(err)
    assert stored(tiny / ".edgekd") == []


def test_a_method_that_refuses_its_options_names_the_line(main, tiny):
    (tiny / "tiny.yaml").write_text(TINY.replace("method: kd", "method: kd\n  temperature: -1"))
    code, _, err = main("distill", "tiny.yaml", "-q")
    line = 1 + (tiny / "tiny.yaml").read_text().splitlines().index("  temperature: -1")
    assert code == 2 and error(err).startswith(f"error: tiny.yaml:{line}: distill.temperature = -1")


@pytest.mark.parametrize("command", [["plan"], ["distill", "-q"]])
def test_data_that_are_not_there(main, tiny, command):
    code, out, err = main(*command, "tiny.yaml", "--set", "data.source=npz", "--set", "data.path=nope.npz")
    assert (code, out) == (2, "")
    assert error(err) == 'error: --set: data.path = "nope.npz": there is no such file or folder'


def test_a_file_in_place_of_the_store(main, tiny):
    Path("file").write_text("mine")
    code, out, err = main("distill", "tiny.yaml", "--store", "file", "-q")
    assert (code, out) == (4, "")
    assert error(err) == "error: the store file cannot be used: a file stands where a folder is needed"
    assert Path("file").read_text() == "mine"


def test_a_backend_that_is_not_installed_does_not_keep_one_from_distilling(done, tmp_path, edgekd):
    (tmp_path / "tiny.yaml").write_text(TINY)
    env = without("onnxruntime", tmp_path)
    ran = edgekd("distill", "tiny.yaml", "--store", done.store, "--dry-run", env=env)
    assert ran.returncode == 0, ran.stderr
    ran = edgekd("compile", "tiny.yaml", "--set", "export.batch=static", "--store", tmp_path / "store", "-q", env=env)
    assert ran.returncode == 3 and "onnxruntime" in error(ran.stderr) and stored(tmp_path / "store") == []


# --- how much is said ---------------------------------------------------------------------------------------------


def compiled(main, done, *arguments: str) -> tuple[str, str]:
    code, out, err = main("compile", "tiny.yaml", "--store", done.store, *arguments)
    assert code == 0
    return out, err


def test_progress_goes_to_stderr_and_results_to_stdout(main, tiny, own_done):
    out, err = compiled(main, own_done)
    assert out.splitlines()[0].split()[0] == "Rung" and out.rstrip().endswith("report.html")
    assert err.splitlines()[0].split() == ["[1/7]", "teacher", "reused"] and len(err.splitlines()) == 7


def test_quiet(main, tiny, own_done):
    out, err = compiled(main, own_done, "-q")
    assert err == "" and out.rstrip().endswith("report.html")


def test_verbose(main, tiny, own_done):
    _, err = compiled(main, own_done, "-v")
    assert "info: teacher " in err and len(err.splitlines()) > 7


def colored(edgekd, done, *arguments: str, **env: str) -> bool:
    ran = edgekd("list", "methods", *arguments, env={"FORCE_COLOR": "1", "TERM": "xterm", **env})
    assert ran.returncode == 0
    return "\x1b[" in ran.stdout


def test_color(edgekd, done):
    assert colored(edgekd, done)
    assert not colored(edgekd, done, NO_COLOR="1")
    assert not colored(edgekd, done, "--no-color")
    assert colored(edgekd, done, NO_COLOR="")


def on_a_terminal(edgekd, done, tmp_path, **env: str) -> str:
    """What stderr shows when it is a terminal."""
    import pty

    (tmp_path / "tiny.yaml").write_text(TINY)
    ours, theirs = pty.openpty()
    process = edgekd.start(
        "compile",
        "tiny.yaml",
        "--store",
        done.store,
        "--set",
        "export.batch=static",
        stderr=theirs,
        env={"TERM": "xterm", **env},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # the other end is closed
            break
    process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0
    return shown.decode()


def test_a_progress_bar_on_a_terminal_but_not_in_ci(edgekd, own_done, tmp_path):
    shown = on_a_terminal(edgekd, own_done, tmp_path)
    assert "\x1b[?25l" in shown and "%" in shown and "done in" in shown  # the cursor is hidden while the bar is drawn
    shown = on_a_terminal(edgekd, own_done, tmp_path, CI="true")
    assert "\x1b[?25l" not in shown and "reused" in shown


def test_a_model_that_is_not_there_cannot_be_checked(main, tmp_path):
    code, _, err = main("check", tmp_path / "nothing.onnx")
    assert code == 2 and err.splitlines() == [
        f"error: {tmp_path / 'nothing.onnx'}: there is no such file",
        "       expected: the path of an ONNX model",
        "fix:   export one: edgekd export, then see .edgekd/store/onnx-student",
    ]

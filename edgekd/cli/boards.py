"""One recipe on several boards, side by side: what they share is made once, a process of its own measures on each."""

from __future__ import annotations

import contextlib
import ctypes
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.cli.asked import Asked, located
from edgekd.cli.outcome import written
from edgekd.errors import BoardFailed, BudgetMissed, EdgekdError, RecipeError, ResultInvalid

if TYPE_CHECKING:
    from edgekd.inventory import Place
    from edgekd.report import BoardsDocument
    from edgekd.stages import Job
    from edgekd.terminal import Terminal

INTERRUPT_PATIENCE_S = 30.0  # for a board's process to leave what it measured in order
SET_PDEATHSIG = 1  # of prctl(2)
# What of the report's table fits on a terminal of 80 columns.
COLUMNS = (0, 1, 2, 3, 5, 8)  # board, target, verdict, score, the student's p50, speed-up
Jobs = Mapping[str, "Job"]
Failures = dict[str, EdgekdError]


def jobs_at(places: Sequence[Place], asked: Asked, terminal: Terminal) -> dict[str, Job]:
    """A job per board by its name, whose run is RUN/NAME. Raises RecipeError for commands that take one."""
    if asked.command not in ("bench", "run"):
        raise RecipeError(
            f"edgekd {asked.command} takes one device, and {len(places)} are named",
            allowed="several devices are for edgekd bench and edgekd run",
            fix="leave --device out, and name the target: --target TARGET",
        )
    run_id, jobs = asked.job(terminal).run_id, {}
    for place in places:
        alone = replace(asked, command="bench", target=asked.target_at(place), devices=(place.url,))
        jobs[place.name] = alone.job(terminal, place, f"{run_id}/{place.name}")
    return jobs


def spread_over(places: Sequence[Place], asked: Asked, terminal: Terminal) -> Job:
    """The job of a spread student, with a board for each part: one run, since together they are one network."""
    jobs = jobs_at(places, asked, terminal)
    first = next(iter(jobs.values()))
    return replace(first, run_id=first.run_id.partition("/")[0], command=asked.line, boards=jobs)


def run(jobs: Jobs, asked: Asked, terminal: Terminal, json_: bool) -> None:
    """Measure on every board; one that fails has a row that says why, and stops no other one."""
    from edgekd import report

    failures = _unreachable(jobs)
    for name, error in failures.items():
        terminal.say_of(name, f"left out: {error.what}")
    failures |= _prepare(_without(jobs, failures), terminal)
    failures |= _measure(_without(jobs, failures), asked, terminal)
    run_id = _record(jobs, asked, failures)
    document, path = written(next(iter(jobs.values())).store, run_id)
    assert isinstance(document, report.BoardsDocument)
    if json_:
        print(document.to_json())
    else:
        _show(document, path, terminal)
    _judge(document, path, failures)


def _without(jobs: Jobs, failures: Failures) -> dict[str, Job]:
    return {name: job for name, job in jobs.items() if name not in failures}


def _unreachable(jobs: Jobs) -> Failures:
    """The boards that do not answer: nobody shall wait for a training to hear that."""
    from edgekd import preflight

    def failure(job: Job) -> EdgekdError | None:
        try:
            preflight.check_device(job).facts()
        except EdgekdError as error:
            return error
        return None

    with ThreadPoolExecutor(len(jobs)) as threads:
        found = dict(zip(jobs, threads.map(failure, jobs.values()), strict=True))
    return {name: error for name, error in found.items() if error}


def _prepare(jobs: Jobs, terminal: Terminal) -> Failures:
    """Make what the boards share: the student once, engines once per target. Raises what making the student raises."""
    from edgekd import pipeline

    failures: Failures = {}
    by_target: dict[str, dict[str, Job]] = {}
    for name, job in jobs.items():
        by_target.setdefault(job.target.model_dump_json(), {})[name] = job
    for number, group in enumerate(by_target.values()):
        job = next(iter(group.values()))
        with located(job), terminal.working():
            if number == 0:
                pipeline.run(job, "student", terminal.on_stage)
            try:
                pipeline.run(job, "engine-student", terminal.on_stage)
            except EdgekdError as error:
                failures |= dict.fromkeys(group, error)
    return failures


# ---------------------------------------------------------------- a process per board


@dataclass
class _Measuring:
    """The process that measures on one board, and what it has said."""

    process: subprocess.Popen[str]
    out: list[str] = field(default_factory=list)
    readers: list[threading.Thread] = field(default_factory=list)


def _measure(jobs: Jobs, asked: Asked, terminal: Terminal) -> Failures:
    """Run `edgekd bench` for every board at once; those that failed."""
    running = {name: _started(name, job, asked, terminal) for name, job in jobs.items()}
    try:
        for one in running.values():
            one.process.wait()
    except KeyboardInterrupt:
        for one in running.values():
            one.process.send_signal(signal.SIGINT)
        for one in running.values():
            try:
                one.process.wait(INTERRUPT_PATIENCE_S)
            except subprocess.TimeoutExpired:
                one.process.kill()
        raise
    finally:
        for one in running.values():
            for reader in one.readers:
                reader.join()
    ended = {name: _failure("".join(one.out), one.process.returncode) for name, one in running.items()}
    return {name: error for name, error in ended.items() if error}


def _started(name: str, job: Job, asked: Asked, terminal: Terminal) -> _Measuring:
    argv = [*shlex.split(job.command)[1:], "--store", str(asked.store), "--run-id", job.run_id, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekd", *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, errors="replace", preexec_fn=_go_with_us,
    )  # fmt: skip
    one = _Measuring(process)
    assert process.stdout is not None and process.stderr is not None
    out, err = process.stdout, process.stderr

    def listen() -> None:
        with err:
            for line in err:
                if not line.endswith(" reused\n"):  # all that is shared has been told of
                    terminal.say_of(name, line.rstrip())

    def keep() -> None:
        with out:
            one.out.append(out.read())

    one.readers = [threading.Thread(target=target, daemon=True) for target in (listen, keep)]
    for reader in one.readers:
        reader.start()
    return one


def _go_with_us() -> None:
    """End a board's process, in order, when this one is gone, however."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGINT)


def _failure(out: str, status: int) -> EdgekdError | None:
    """Why a board's process has no report; None when it has one."""
    if status in (0, BudgetMissed.exit_code, ResultInvalid.exit_code):
        return None
    parts: dict[str, Any] = {"what": f"its process ended with exit status {status}"}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        parts |= json.loads(out)["error"]
    error = EdgekdError(parts.pop("what"), **parts)
    error.exit_code = status
    return error


# ---------------------------------------------------------------- what came of it


def _record(jobs: Jobs, asked: Asked, failures: Failures) -> str:
    first = next(iter(jobs.values()))
    run_id = first.run_id.partition("/")[0]
    listed = [
        {
            "name": name, "url": job.device, "target": job.target.name, "run_id": job.run_id,
            "error": {"what": error.what, "exit_code": error.exit_code} if (error := failures.get(name)) else None,
        }
        for name, job in jobs.items()
    ]  # fmt: skip
    content = {
        "schema_version": 1, "run_id": run_id, "created": first.created, "command": asked.line,
        "recipe": first.recipe.model_dump(mode="json"), "boards": listed,
    }  # fmt: skip
    first.store.record(run_id, content)
    return run_id


def _show(document: BoardsDocument, path: Path, terminal: Terminal) -> None:
    from edgekd.report import boards

    table = boards.table(document)
    for row in table.rows:
        if row.reason:
            terminal.say(f"{row.cells[0]}: {row.reason}")
    lines = [table.columns, *(row.cells for row in table.rows if not row.reason)]
    columns, *rows = ([cells[at] for at in COLUMNS] for cells in lines)
    if rows:
        terminal.table(columns, rows)
    terminal.say("")
    terminal.say(f"{document.status}: {boards.headline(document)}")
    terminal.say(str(path))


def _judge(document: BoardsDocument, path: Path, failures: Failures) -> None:
    """Raises BoardFailed, ResultInvalid or BudgetMissed, in this order: the report is there."""
    if failures:
        name, first = next(iter(failures.items()))
        codes = {error.exit_code for error in failures.values()}
        error = BoardFailed(
            f"{name} was not measured: {first.what}",
            allowed=f"{len(failures)} of {len(document.boards)} boards failed, all in {path}",
            fix=first.fix,
        )
        error.exit_code = codes.pop() if len(codes) == 1 else BoardFailed.exit_code
        raise error
    for board in document.boards:
        if board.status == "INVALID":
            raise ResultInvalid(
                f"the measurement on {board.name} does not hold: {board.reasons[0]}",
                allowed=f"reasons for each board in {path}",
                fix=f"quiet the board and measure again: edgekd bench --device {shlex.quote(board.url)}",
            )
    for board in document.boards:
        if board.missed:
            raise BudgetMissed(
                f"{board.name} misses budgets.{board.missed[0]}",
                allowed=f"budgets of each board in {path}",
                fix="train longer, choose a larger student or another quantize.method, or relax the budget",
            )

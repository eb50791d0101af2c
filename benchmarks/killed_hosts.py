"""Kills the host at random points of a remote benchmark: is the next run clean, and does nothing run on there?

    python benchmarks/killed_hosts.py [--points 50] [--report]

Needs an ssh server (sudo apt-get install openssh-server): the remote machine is this one, by a server of its own. It is
the code of the test, which tries a few points.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from results import write_section

TESTS = Path(__file__).parent.parent / "tests" / "device"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    arguments = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    import private_sshd

    if reason := private_sshd.missing():
        sys.exit(reason)
    with tempfile.TemporaryDirectory() as folder:
        sshd = private_sshd.Sshd(Path(folder, "sshd"))
        try:
            length_s = whole_run(sshd, Path(folder, "first"))
            found = [kill_at(share, sshd, Path(folder, str(number)), length_s)
                     for number, share in enumerate(points(arguments.points, arguments.seed))]  # fmt: skip
        finally:
            sshd.stop()
    clean, kept = sum(row["clean"] for row in found), sum(row["kept"] for row in found)
    text = (
        f"{len(found)} kills (SIGKILL) at random points from the start of the host's process to the end of its run: "
        f"{clean} clean continuations, {sum(row['left'] for row in found)} processes left on the board; "
        f"{kept} times launches had been measured before the kill, and were not measured again."
    )
    print(text)
    if arguments.report:
        body = f"{text}\n\nMade by `benchmarks/killed_hosts.py`."
        write_section("killed_hosts", "Hosts killed in the middle of a remote benchmark", body)


def points(number: int, seed: int) -> list[float]:
    """Shares of a run's length."""
    shares: list[float] = np.random.default_rng(seed).uniform(0, 1, number).tolist()
    return shares


def whole_run(sshd: Any, folder: Path) -> float:
    """Seconds that an uninterrupted run takes now: others use this machine too."""
    from test_interruptions import start_host

    started = time.monotonic()
    with start_host(sshd.url(python=sys.executable), folder) as host:
        host.wait()
    return time.monotonic() - started


def kill_at(share: float, sshd: Any, folder: Path, length_s: float) -> dict[str, int]:
    """Kill a host so far into its run, and run it again."""
    from test_interruptions import check, jobs, kill_host_and_go_on, processes_in

    at = time.monotonic() + share * length_s
    try:
        result = kill_host_and_go_on(sshd.url(python=sys.executable), sshd, folder, lambda: time.monotonic() > at)
        check(result, sshd, interruptions=result["interruptions"])
        clean, kept = 1, int(result["interruptions"] > 0)
    except Exception as error:
        print(f"at {share:.3f} of {length_s:.1f} s: {type(error).__name__}: {error}", file=sys.stderr)
        clean = kept = 0
    left = len([pid for job in jobs(sshd) for pid in processes_in(str(job))])
    print(f"at {share:.3f} of {length_s:.1f} s: clean {clean}, launches kept {kept}, left {left}", flush=True)
    return {"clean": clean, "kept": kept, "left": left}


if __name__ == "__main__":
    main()

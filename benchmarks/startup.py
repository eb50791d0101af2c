"""How long the command line takes when it has nothing to do.

    python benchmarks/startup.py [--runs 10] [--report]

Each command runs in a process of its own; what counts is the wall time that a user waits.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

from results import table, write_section

COMMANDS = {
    "edgekd --help": ["--help"],
    "edgekd list": ["list"],
    "edgekd run digits --dry-run": ["run", "digits", "--dry-run"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, words in COMMANDS.items():
            seconds = [timed(words, folder) for _ in range(given.runs + 1)][1:]  # the first one warms the disk cache
            rows.append([f"`{name}`", f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f} to {max(seconds):.2f}"])
            print(*rows[-1])
    if given.report:
        body = table(["command", "median, s", "range"], rows) + "\n\nMade by `benchmarks/startup.py`."
        write_section(
            "startup", "Start-up", f"Wall time over {given.runs} runs, on a shared machine with two cores.\n\n{body}"
        )


def timed(words: list[str], folder: str) -> float:
    command = [sys.executable, "-c", "from edgekd.cli import main; main()", *words]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

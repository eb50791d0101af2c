"""The command line of the agent."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading

from .clocks import restore
from .conductor import Bench
from .errors import AgentError
from .machine import facts
from .worker import work


def hold_lifeline() -> None:
    """End this process and all that it started as soon as standard input closes."""
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    lifeline = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    def wait() -> None:
        while os.read(lifeline, 4096):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main() -> int:
    """Run one command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Times inference engines on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    looking = commands.add_parser("facts", help="print what machine this is, as JSON")
    timing = commands.add_parser("bench", help="time the models of a spec; run it in the spec's folder")
    timing.add_argument("spec")
    timing.add_argument("--lifeline", action="store_true", help="end when standard input closes")
    for command in (looking, timing):
        command.add_argument("--root", default="/", help="where the kernel's files are looked for")
    restoring = commands.add_parser("restore", help="put values back when standard input ends (used by bench)")
    restoring.add_argument("before", type=json.loads)
    working = commands.add_parser("work", help="serve one model (used by bench)")
    working.add_argument("model", type=json.loads)
    working.add_argument("samples")
    arguments = parser.parse_args()
    if arguments.command == "facts":
        print(json.dumps(facts(arguments.root), indent=2))
    elif arguments.command == "restore":
        restore(arguments.before)
    elif arguments.command == "work":
        work(arguments.model, arguments.samples)
    else:
        if arguments.lifeline:
            hold_lifeline()
        try:
            with open(arguments.spec) as file:
                Bench(json.load(file), arguments.root).run()
        except AgentError as error:
            sys.stderr.write(json.dumps({"error": str(error)}) + "\n")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times engines on the machine that it runs on. Stands alone: this folder is copied to the board.

Python 3.8 or newer, the standard library and numpy; each runtime is imported by its runner, a file beside it.

    python -m agent facts              # what machine this is: JSON on standard output
    python -m agent bench spec.json    # time the spec's models; writes result.json, NAME_latency.npy, NAME_logits.npy

Every model runs in a process of its own, so that load time and memory are its own and a crash names it. All are warmed
up, then take turns in short blocks, so that heat, clocks and other load meet them alike. This is done in several
launches with fresh processes, since where the loader puts code and data moves a process's speed by more than its own
measurements spread. Sensors are read between rounds of blocks only, but for monitors of power, which a thread of the
waiting conductor reads 20 times a second. Progress goes to standard error as JSON lines.

A launch is on disk as soon as it is over: started again in the same folder with the same spec, an interrupted benchmark
goes on behind its last launch.

With `--lifeline` the agent and all that it started end when its standard input closes: so whoever holds the other end,
on this machine or across a network, takes everything along when it goes.
"""

from __future__ import annotations

# Of the spec and of result.json.
VERSION = 1

"""`python -m edgekd`: the command line, also for `accelerate launch -m edgekd`, which starts modules and not scripts."""

from edgekd.cli import main

main()

"""`python -m edgekd`: the command line as a module, which is what `accelerate launch -m edgekd` starts."""

from edgekd.cli import main

main()

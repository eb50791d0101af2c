"""What is printed is what was meant."""

from __future__ import annotations

from edgekd.terminal import Terminal


def test_cells_of_a_table_are_no_markup(capsys):
    rows = [("torch", "pip install 'edgekd[train]'"), ("[/layer]", "\x1b[31mwhat a board\x07 says")]
    Terminal(color=False).table(("what", "fix"), rows)
    assert capsys.readouterr().out.splitlines() == [
        "what      fix                        ",
        "torch     pip install 'edgekd[train]'",
        "[/layer]  [31mwhat a board says      ",
    ]

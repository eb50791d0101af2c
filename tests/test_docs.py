"""What the documents say is held against the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer.main
import yaml

from edgekd import __version__, recipe
from edgekd.cli import app
from edgekd.methods import Step

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "DECISIONS.md", "CHANGELOG.md", "docs/results.md")
]
# What is written for users, with commands to type.
GUIDES = [ROOT / name for name in ("README.md", "docs/boards.md", "docs/backends.md")]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def lines_with_commands() -> list[str]:
    """The command lines in the guides: in code blocks, and between backticks."""
    text = "\n".join(guide.read_text(encoding="utf-8") for guide in GUIDES)
    blocks = (
        "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL)) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", text))
    )
    return [line.split("#")[0].strip() for line in blocks.splitlines() if line.startswith("edgekd ")]


@pytest.mark.parametrize("line", lines_with_commands())
def test_every_command_of_the_guides_parses(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = COMMANDS[name]
    context = command.make_context(name, words, resilient_parsing=False)
    sets = context.params.get("set_")
    if sets:
        recipe.load(context.params["recipe"] or "digits", sets)


def test_the_readme_lists_every_exit_code_and_shipped_recipe() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for code in (0, 1, 2, 3, 4, 5, 6, 130):
        assert f"| {code} |" in text
    for name in recipe.shipped():
        assert f"`{name}`" in text


def test_every_command_has_help_and_help_for_its_options() -> None:
    for name, command in COMMANDS.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"


def test_the_method_of_the_contributing_guide_works() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    namespace: dict[str, object] = {"__name__": "example"}
    exec(code, namespace)
    method = namespace["LogitMSE"](weight=2.0)  # type: ignore[operator]
    student, teacher = torch.ones(4, 3, requires_grad=True), torch.zeros(4, 3)
    terms = method(
        Step(torch.zeros(4, 1), torch.zeros(4), progress=0.0, student=lambda x: student, teacher=lambda: teacher)
    )
    assert terms["mse"].item() == pytest.approx(2.0)


@pytest.mark.parametrize("document", [*DOCUMENTS, *GUIDES[1:]], ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / link).exists(), link


def test_every_section_of_the_results_names_the_script_that_made_it() -> None:
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    sections = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end of \1 -->", text, re.DOTALL)
    assert sections
    for name, body in sections:
        (script,) = re.findall(r"Made by `benchmarks/([\w/]+)\.py`\.", body)
        assert f"{name}_".startswith(f"{script.replace('/', '_')}_")  # of a script with several sections, NAME_STUDY
        assert (ROOT / "benchmarks" / f"{script}.py").exists()


def test_shipped_recipes_say_what_they_are() -> None:
    for name in recipe.shipped():
        content = yaml.safe_load((recipe.SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
        assert content["name"] == name
        assert content["description"]


def test_the_changelog_knows_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## {__version__}" in text or "## Unreleased" in text

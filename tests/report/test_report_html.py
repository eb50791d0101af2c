from __future__ import annotations

import itertools
import re
import subprocess
import sys
from collections import Counter
from html import escape
from html.parser import HTMLParser

import pytest

from edgekd.report import Document, load, write
from edgekd.report.formatting import milliseconds, percent
from edgekd.report.html import html_from_document
from edgekd.report.tables import RUNG_LABELS, headline

SECTIONS = [
    "Budgets",
    "Accuracy ladder",
    "Latency",
    "How it was measured",
    "Training",
    "Confusion matrix",
    "Learned activations",
    "Quantization",
    "Engines",
    "Environment",
    "Artifacts",
    "Recipe, every default filled in",
    "Notes",
]
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Outline(HTMLParser):
    """Elements in order with their attributes and text; fails on tags that are not balanced."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    def text_in(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    def all_text(self) -> str:
        return " ".join(text for inside, text in self.texts if inside != "style")


@pytest.fixture(scope="module")
def page(document) -> str:
    return html_from_document(document)


def page_of(report: dict) -> Outline:
    return Outline(html_from_document(Document.model_validate(report)))


def test_verdict_first(page, document):
    outline = Outline(page)
    assert outline.text_in("h1") == ["4.32x faster, −1.15 points of accuracy, on raspberry-pi-5"]
    before_title = [text for _, text in outline.texts[: outline.texts.index(("h1", outline.text_in("h1")[0]))]]
    assert "VALID" in before_title
    assert "BUDGET MISSED" in before_title
    assert document.command in outline.text_in("code")


def test_every_section_has_a_heading(page):
    outline = Outline(page)
    assert outline.text_in("h2") == SECTIONS
    anchors = {attrs["href"] for tag, attrs in outline.elements if tag == "a"}
    sections = {f"#{attrs['id']}" for tag, attrs in outline.elements if tag == "section"}
    assert anchors == sections
    assert len(sections) == len(SECTIONS)


def test_every_rung_is_shown(page):
    for label in RUNG_LABELS.values():
        assert Outline(page).text_in("th").count(label) >= 1
        assert f">{label}</text>" in page


def test_every_hash_and_layer_is_shown(page, document):
    for made in document.artifacts:
        assert made.sha256 in page
    for layer in document.activation:
        assert f"<strong>{layer.name}</strong>" in page
    assert page.count("<svg") == 1 + 3 + 1 + 3 + 2 + 2 + 2 + len(document.activation)


def test_accessible(page):
    outline = Outline(page)
    counts = Counter(tag for tag, _ in outline.elements)
    assert counts["caption"] == counts["table"]
    assert counts["figcaption"] == counts["figure"] == counts["svg"]
    assert all(attrs.get("scope") in ("col", "row") for tag, attrs in outline.elements if tag == "th")
    assert all(
        attrs.get("role") == "img" and attrs.get("aria-label") for tag, attrs in outline.elements if tag == "svg"
    )
    ids = [attrs["id"] for _, attrs in outline.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_nothing_is_fetched_or_run(page):
    outline = Outline(page)
    assert re.search(r"https?:|@import|url\((?!#)", page, re.IGNORECASE) is None
    assert re.findall(r"\w+://", page) == ["ssh://"]  # the target's device, as text
    tags = {tag for tag, _ in outline.elements}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    for tag, attrs in outline.elements:
        assert not any(name.startswith("on") for name in attrs)
        for name in ("href", "src", "xlink:href"):
            assert attrs.get(name, "#").startswith("#"), (tag, attrs)
    assert "default-src 'none'" in page


def test_references_inside_figures_resolve(page):
    defined = set(re.findall(r' id="([^"]+)"', page))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', page))
    assert used
    assert used <= defined


def test_colours_follow_the_theme(page):
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b|\brgb\(", drawings) == []
    roles = set(re.findall(r"var\(--(\w+)\)", page))
    light, dark = re.findall(r":root \{(.*?)\}", page, re.DOTALL)
    for theme in (light, dark):
        assert roles <= set(re.findall(r"--(\w+):", theme))


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast(page):
    for theme in re.findall(r":root \{(.*?)\}", page, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", theme))
        for role, least in {"text": 7, "muted": 4.5, "link": 4.5, "better": 4.5, "worse": 4.5}.items():
            for ground in ("surface", "panel"):
                low, high = sorted((luminance(colours[role]), luminance(colours[ground])))
                assert (high + 0.05) / (low + 0.05) >= least, (role, ground)
        for role in ("student", "teacher", "scratch"):
            low, high = sorted((luminance(colours[role]), luminance(colours["surface"])))
            assert (high + 0.05) / (low + 0.05) >= 3, role


def test_invalid_with_reasons(brief):
    reasons = ["too short: 12 queries of the student", "clocks changed: from 600 to 2400 MHz"]
    brief["verdict"] |= {"status": "INVALID", "reasons": reasons}
    outline = page_of(brief)
    assert outline.text_in("title")[0].startswith("INVALID: ")
    assert "INVALID" in outline.text_in("span")
    assert "This measurement does not hold" in outline.all_text()
    assert [text for text in outline.text_in("li") if text in reasons] == reasons


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "$\\frac{1}{0}$", "日本語", "a\nb\x07",
           "--><b>", "</style>", "{{ 7*7 }}", 'id="x" #010101', "</text></svg><b>"]  # fmt: skip


def test_hostile_names_are_text(report):
    report["confusion"]["classes"] = HOSTILE
    for index, layer in enumerate(report["activation"]):
        layer["name"] = HOSTILE[index]
    report["target"]["name"] = HOSTILE[0]
    report["telemetry"]["series"] = {HOSTILE[1]: report["telemetry"]["series"]["cpu_hz"]}
    report["notes"] = report["verdict"]["reasons"] = HOSTILE
    report["environment"] = {HOSTILE[0]: {HOSTILE[1]: HOSTILE[2]}}
    outline = page_of(report)
    tags = {tag for tag, _ in outline.elements}
    assert not tags & {"script", "img"}
    assert Counter(tag for tag, _ in outline.elements)["b"] == 5  # the five findings
    assert not any(name.startswith("on") for _, attrs in outline.elements for name in attrs)
    assert "{{ 7*7 }}" in outline.text_in("li")
    assert 'id="x" #010…' in outline.text_in("text")


@pytest.mark.parametrize(
    ("part", "value", "stated"),
    [
        ("activation", [], "No layer of the student has a learned activation."),
        ("activation", {"reason": "The student uses plain ReLU."}, "The student uses plain ReLU."),
        ("confusion", {"reason": "The labels are not known on the device."}, "The labels are not known on the device."),
        ("quantization", {"reason": "The recipe asks for no quantization."}, "The recipe asks for no quantization."),
        ("quantization", {"reason": "Refused by the backend."}, "Refused by the backend."),
        ("mode", {"reason": "The board could not be reached."}, "The board could not be reached."),
        ("telemetry", {"reason": "No sensor can be read here."}, "No sensor can be read here."),
        ("telemetry", {"time_s": [], "series": {}}, "The device offers no sensor that could be read."),
        ("training", {}, "This run did not train it."),
        ("training", {"teacher": {"reason": "Loaded from teacher.safetensors."}}, "Loaded from teacher.safetensors."),
        ("latency", {"student": {"reason": "The board could not be reached."}}, "The board could not be reached."),
        (
            "verdict",
            {"status": "VALID", "speedup": {"value": 2, "ci95": [1, 3]}},
            "The run did not record the speed-up",
        ),
        ("latency", None, "The run recorded no single samples, so there is no distribution to draw."),
        ("artifacts", [], "The run recorded no artifact."),
        ("environment", {}, "The run recorded no facts about its machine."),
        ("notes", [], "The run left no notes."),
        ("ladder", [], "No rung was measured, so there is nothing to draw."),
    ],
)
def test_what_is_missing_says_why(brief, part, value, stated):
    assert stated in page_of(brief if value is None else brief | {part: value}).all_text()


@pytest.mark.parametrize(
    ("met", "badge"),
    [([True, True], "BUDGETS MET"), ([True, None], ""), ([None, False], "BUDGET MISSED"), ([], "")],
)
def test_budgets_that_nothing_measured_are_neither_met_nor_missed(brief, met, badge):
    brief["verdict"] |= {
        "status": "NOT_MEASURED",
        "reasons": ["nothing was measured on a device: edgekd bench"],
        "budgets": [
            {"name": f"b{i}", "limit": 1, "value": None if m is None else 1, "met": m} for i, m in enumerate(met)
        ],
    }
    outline = page_of(brief)
    badges = [text for tag, text in outline.texts if tag == "span" and text.isupper()]
    assert badges == ["NOT MEASURED", *([badge] if badge else [])]
    assert "This is no measurement yet" in outline.all_text()
    assert outline.text_in("td").count("not measured") == met.count(None)


def test_a_student_that_was_trained_with_rounding_is_listed(brief):
    without = page_of(brief).text_in("th")
    brief["training"]["finetune"] = brief["training"]["student"]
    outline = page_of(brief)
    assert "Student, with rounding" not in without
    assert "Student, with rounding" in outline.text_in("th")
    assert outline.text_in("span").count("student, with rounding") == 2  # the legends of both figures


def test_teacher_absent(brief):
    reason = "The recipe names no teacher."
    brief["ladder"][0] = {"rung": "teacher", "reason": reason}
    brief["latency"]["teacher"] = {"reason": reason}
    brief["confusion"]["teacher"] = {"reason": reason}
    brief["verdict"] |= {"speedup": {"reason": reason}, "accuracy_change": {"reason": reason}}
    brief["training"].pop("teacher")
    outline = page_of(brief)
    row, student = brief["ladder"][-1], brief["latency"]["student"]
    score, median = percent(row["score"]), milliseconds(student["p50_ms"])
    assert outline.text_in("h1") == [
        f"Accuracy {score}, median {median}, not compared with a teacher, on raspberry-pi-5"
    ]
    assert f"Teacher not measured: {reason}" in outline.text_in("p")
    assert f"Not compared with the teacher: {reason}" in outline.text_in("p")


def test_smallest_report(brief):
    required = ("schema_version", "run_id", "created", "command", "recipe", "target", "verdict", "ladder")
    bare = {name: brief[name] for name in required} | {"verdict": {"status": "VALID"}, "target": {}, "ladder": []}
    outline = page_of(bare)
    assert outline.text_in("h2") == SECTIONS
    assert outline.text_in("h1") == ["Not compared with a teacher, on an unnamed target"]


@pytest.mark.parametrize(
    ("ci95", "value", "wording"),
    [
        ((4.1, 4.3), 4.2, "4.20x faster"),
        ((0.4, 0.6), 0.5, "2.00x slower"),
        ((0.97, 1.05), 1.01, "As fast as its teacher"),
    ],
)
def test_speed_in_words(brief, ci95, value, wording):
    brief["verdict"]["speedup"] = {"value": value, "ci95": ci95}
    assert page_of(brief).text_in("h1")[0].startswith(wording)


@pytest.mark.parametrize(
    ("value", "wording"),
    [(0.012, "+1.20 points of accuracy"), (0.0, "equal accuracy"), (-0.00001, "equal accuracy")],
)
def test_accuracy_in_words(brief, value, wording):
    brief["verdict"]["accuracy_change"] |= {"value": value}
    assert f", {wording}, on " in headline(Document.model_validate(brief))


def test_same_document_same_bytes(document, tmp_path):
    """Another process, another hash seed, other Matplotlib settings: the same bytes."""
    write(document, tmp_path / "here")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\naxes.grid: False\nsvg.fonttype: path\n")
    again = f"""
from pathlib import Path
from edgekd.report import load, write
write(load(Path({str(tmp_path / "here" / "report.json")!r})), Path({str(tmp_path / "there")!r}))
"""
    environment = {
        "PYTHONHASHSEED": "7",
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
        "PYTHONPATH": ":".join(sys.path),
    }
    environment["MPLCONFIGDIR"] = str(tmp_path)
    subprocess.run([sys.executable, "-c", again], check=True, env=environment, timeout=60)
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
    assert load(tmp_path / "there" / "report.json") == document


def test_report_needs_no_torch():
    code = "import sys, edgekd.report.html; sys.exit(len({'torch', 'matplotlib.pyplot'} & {*sys.modules}))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_recipe_and_environment_are_complete(page):
    for text in ("distill.temperature", "student.activation.lma.k", "onnxruntime.version", "ssh://pi@pi5.local"):
        assert f">{escape(text)}<" in page

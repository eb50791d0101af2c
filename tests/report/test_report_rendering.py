"""The report in a real browser: what no parser can see."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
from html import unescape
from pathlib import Path

import pytest

from edgekd.report import Document
from edgekd.report.html import html_from_document

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 400)
SMALLEST_TEXT = 8.5  # CSS pixels
BROWSER_TIMEOUT_S = 120  # some seconds, but for a machine under heavy load
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to render the report with")

# Goes into copies of the page only: the report itself has no script.
PROBE = """
<script>
addEventListener("load", () => {
  const outside = [], clipped = [];
  for (const element of document.querySelectorAll("body *")) {
    const right = element.getBoundingClientRect().right;
    if (!element.closest(".scroll") && right > innerWidth + 1) outside.push(element.outerHTML.slice(0, 120));
  }
  let smallest = 100;
  for (const text of document.querySelectorAll("svg text")) {
    const svg = text.closest("svg"), box = text.getBoundingClientRect(), frame = svg.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1) clipped.push(text.textContent);
    if (box.top < frame.top - 1 || box.bottom > frame.bottom + 1) clipped.push(text.textContent);
    const scale = frame.width / svg.viewBox.baseVal.width;
    smallest = Math.min(smallest, parseFloat(getComputedStyle(text).fontSize) * scale);
  }
  parent.postMessage({
    name: location.pathname.split("/").pop(), width: innerWidth, outside, clipped, smallest,
    scroll_width: document.documentElement.scrollWidth,
    fetched: performance.getEntriesByType("resource").length,
    background: getComputedStyle(document.body).backgroundColor,
    figures: document.querySelectorAll("svg").length,
  }, "*");
});
</script>
"""
# Holds the copies in frames as wide as asked for (Chromium's own window is at least 500 pixels wide).
FRAMES = """<!DOCTYPE html><title>[]</title><script>
const found = [];
addEventListener("message", event => {{ found.push(event.data); document.title = JSON.stringify(found); }});
</script>{frames}"""


def measured(pages: dict[str, str], folder: Path, *, dark: bool) -> list[dict]:
    """What the probe finds in each page at each width."""
    frames = ""
    for name, page in pages.items():
        page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
        (folder / name).write_text(page.replace("</head>", PROBE + "</head>"), encoding="utf-8")
        frames += "".join(
            f'<iframe src="{name}" width="{width}" height="900" style="border: 0"></iframe>' for width in WIDTHS
        )
    (folder / "frames.html").write_text(FRAMES.format(frames=frames), encoding="utf-8")
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", f"--user-data-dir={folder / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--window-size=1400,900", "--dump-dom",
        (folder / "frames.html").as_uri(),
    ]  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", output_of(command), re.DOTALL)
    assert title
    return json.loads(unescape(title[1]))


def output_of(command: list[str]) -> str:
    """What a browser prints; its helper processes end with it, whatever happens."""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as browser:
        try:
            return browser.communicate(timeout=BROWSER_TIMEOUT_S)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(browser.pid, signal.SIGKILL)


def long_report(report: dict) -> dict:
    """The same with everything longer than a page is wide."""
    k = len(report["confusion"]["classes"])
    report["confusion"]["classes"] = [f"a-class-with-a-very-long-name-{i}" for i in range(k)]
    report["command"] += " --set " + "x" * 300
    report["run_id"] = "r" * 120
    report["target"]["name"] = "target-" + "t" * 60
    report["environment"]["device"]["kernel"] = "k" * 200
    report["environment"]["n" * 80] = {"f" * 90: "v" * 90}
    report["verdict"] |= {"status": "INVALID", "reasons": ["because " + "y" * 200]}
    report["ladder"][5]["reason"] = "The backend refused it: " + "z" * 150
    report["notes"] = ["w" * 400]
    for layer in report["activation"]:
        layer["name"] = "module." * 20
    for i, layer in enumerate(report["quantization"]["layers"]):
        layer["layer"] = f"{'module.' * 20}{i}"
    report["quantization"] |= {"still_float": [], "warnings": ["w" * 400], "options": {"keep_float": ["k" * 300]}}
    return report


@pytest.mark.parametrize("dark", [False, True])
def test_nothing_overflows(report, tmp_path, dark):
    usual = html_from_document(Document.model_validate(report))
    long = html_from_document(Document.model_validate(long_report(report)))
    results = measured({"usual.html": usual, "long.html": long}, tmp_path, dark=dark)
    assert {(found["name"], found["width"]) for found in results} == {
        (name, width) for name in ("usual.html", "long.html") for width in WIDTHS
    }
    for found in results:
        assert found["scroll_width"] <= found["width"], found
        assert found["outside"] == []
        assert found["clipped"] == []
        assert found["figures"] == usual.count("<svg")
        assert found["fetched"] == 0
        assert found["smallest"] >= SMALLEST_TEXT
        assert found["background"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")

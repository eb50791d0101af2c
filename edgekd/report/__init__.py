"""The report of a run: `report.json` and, from it alone, `report.html` and `report.md`."""

from __future__ import annotations

import os
from pathlib import Path

from edgekd.errors import StoreError
from edgekd.report.boards import BoardsDocument
from edgekd.report.document import Document, load
from edgekd.report.part import Absent

__all__ = ["Absent", "BoardsDocument", "Document", "load", "write"]


def write(document: Document | BoardsDocument, folder: Path) -> Path:
    """Write the three files into `folder`, each complete or not at all; returns the path of report.html.

    The same document gives the same bytes. Raises `StoreError` when the folder cannot be written.
    """
    # Matplotlib and Jinja are loaded only when pages are made, so that commands that make none start fast.
    from edgekd.report import html, markdown

    if isinstance(document, Document):
        texts = markdown.markdown_from_document(document), html.html_from_document(document)
    else:
        texts = markdown.markdown_from_boards(document), html.html_from_boards(document)
    pages = {"report.json": document.to_json(), "report.md": texts[0], "report.html": texts[1]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages.items():
            unfinished = folder / f".{name}.{os.getpid()}"
            unfinished.write_text(text, encoding="utf-8", newline="\n")
            unfinished.replace(folder / name)
    except OSError as error:
        raise StoreError(
            f"{folder}: cannot write the report ({error.strerror})",
            allowed="each of its files is written whole or not at all",
            fix="free some space or give a folder that you may write to",
        ) from error
    return folder / "report.html"

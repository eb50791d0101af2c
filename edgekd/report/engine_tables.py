"""What the report says about engines: on what each claim rests, how each model was compiled, and its layers."""

from __future__ import annotations

from edgekd.report.document import Document
from edgekd.report.engines import CompiledEngine
from edgekd.report.formatting import DASH, number, size
from edgekd.report.passage import Passage
from edgekd.report.tables import Row, Table

LEVELS = (
    "Levels, from the weakest: linted, by rules read off the compiler's releases; compiled_by_tensorrt_rtx(version, "
    "sm), by its desktop sibling for a chip that is not here; compiled_on_host and measured_on_host, on this machine; "
    "built_on_device; measured_on_device. Latency and energy are claimed as measured_on_device alone, the size of an "
    "engine that the board builds as built_on_device."
)
CLAIMS = {
    "acceptance": "The model compiles for the target", "layers": "Precision of the student's layers",
    "engine size": "Size of the engine", "accuracy": "Accuracy", "latency": "Latency", "energy": "Energy",
}  # fmt: skip


def passages(document: Document) -> list[Passage]:
    """Everything in the order in which it is read; a passage that has nothing to say is left out."""
    found = [Passage("evidence", "What each claim rests on", (), _claims(document))]
    for name, engine in document.engines.items():
        found += [
            Passage(f"{name}-alarms", f"Alarms: {name}", tuple(engine.alarms)),
            Passage(f"{name}-engine", f"The {name}'s engine", (), _facts(engine, name)),
            Passage(f"{name}-layers", f"Layers of the {name}", (), _layers(engine, name)),
            Passage(f"{name}-findings", f"What the compiler takes ill in the {name}", (), _findings(engine, name)),
        ]
    return [passage for passage in found if passage.sentences or passage.table]


def _claims(document: Document) -> Table | None:
    rows = [Row((CLAIMS[claim.subject], claim.evidence, claim.basis)) for claim in document.evidence]
    columns = ("Claim", "Evidence", "By")
    about = "Every claim of this report and its level of evidence"
    return Table(about, columns, tuple(rows), (LEVELS,), frozenset({0, 1, 2})) if rows else None


def _facts(engine: CompiledEngine, name: str) -> Table:
    int8 = [row for row in engine.layers if row.asked == "int8"]
    facts = {
        "backend": engine.backend,
        "compiler": engine.compiler,
        "evidence": engine.evidence,
        "size": DASH if engine.size_bytes is None else size(engine.size_bytes),
        "build": DASH if engine.build_seconds is None else f"{number(engine.build_seconds)} s",
        "kernels": DASH if engine.kernels is None else f"{engine.kernels}",
        "layers in INT8": f"{sum(row.ran == 'int8' for row in int8)} of {len(int8)} asked for" if int8 else DASH,
        **engine.facts,
    }
    rows = tuple(Row((what, value)) for what, value in facts.items() if value != DASH)
    return Table(f"How the {name} was compiled", ("Fact", "Value"), rows, text_columns=frozenset({0, 1}))


def _layers(engine: CompiledEngine, name: str) -> Table | None:
    rows = tuple(
        Row((row.layer, row.operator, row.asked, row.ran, row.kernel or DASH), strong=_differs(row.asked, row.ran))
        for row in engine.layers
    )
    columns = ("Layer", "Operator", "Asked for", "Ran in", "Kernel")
    about = f"The precision in which each layer of the {name} runs ({engine.evidence})"
    return Table(about, columns, rows, text_columns=frozenset({0, 1, 2, 3, 4})) if rows else None


def _differs(asked: str, ran: str) -> bool:
    return asked == "int8" and ran != "int8"


def _findings(engine: CompiledEngine, name: str) -> Table | None:
    rows = tuple(Row((one.node, one.reason, one.fix)) for one in engine.findings)
    columns = ("Node", "Reason", "To mend it")
    about = f"Taken, but not as meant, in the {name}"
    return Table(about, columns, rows, text_columns=frozenset({0, 1, 2})) if rows else None

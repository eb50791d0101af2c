"""From what the stages stored to the report's part on engines: what was compiled, by whom, and what that proves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.artifact import Artifact
from edgekd.report.engines import MEASURED, Claim, CompiledEngine
from edgekd.report.formatting import fact, milliseconds

Artifacts = Mapping[str, Artifact]
MEASURED_ON_HOST = "measured_on_host"
PARTS = ("copy_in", "compute", "copy_out")
IDENTITY = ("device", "compute_capability", "multiprocessors", "l4t")


def engines(artifacts: Artifacts) -> dict[str, CompiledEngine]:
    """Student and teacher as they were compiled, as far as they were."""
    found = {}
    for subject in ("student", "teacher"):
        if f"build-{subject}" in artifacts:
            found[subject] = _built(artifacts[f"build-{subject}"].result, artifacts[f"engine-{subject}"].result)
        elif f"engine-{subject}" in artifacts:
            found[subject] = _compiled(artifacts[f"engine-{subject}"].result)
        if subject in found:
            found[subject].facts.update(_parts(artifacts, subject))
    return found


def _compiled(result: Mapping[str, Any]) -> CompiledEngine:
    compiled = result["compiled"] or {}
    facts = result["facts"]
    return CompiledEngine(
        backend=result["backend"],
        evidence=result["evidence"],
        compiler=compiled.get("compiler") or f"{facts['runtime']} {facts['version']}",
        size_bytes=result.get("size_bytes"),
        kernels=compiled.get("kernels", kernels_of(facts)),
        layers=compiled.get("layers", []),
        alarms=alarms_of(result),
        findings=_findings(result),
        facts=told_by_compiler(facts),
    )


def told_by_compiler(facts: Mapping[str, Any]) -> dict[str, str]:
    """What a backend of this machine found by measuring while it compiled, in words; facts: those of `compile`."""
    told = {}
    for lma in facts.get("lma", ()):
        ratio = (lma["over_relu"] or {}).get(lma["form"])
        cost = "by rule, not measured" if ratio is None else f"chosen by measuring, {ratio:.2f} of a ReLU's loop"
        told[f"LMA of {lma['segments']} segments"] = f"{lma['form']}: {cost}"
    if ratio := facts.get("lma_table_ratio"):
        kept = f"{len(facts['lma_tables'])} of the layers" if facts["lma_tables"] else "none"
        told["LMA as tables"] = f"{kept}; with them {_range(ratio)} of the time without"
    if tuning := facts.get("tuning"):
        searched = f"{tuning['trials']} trials of {tuning['tasks']} kernels, {tuning['known']} known before"
        ratio = f", tuned {_range(tuning['ratio'])} of untuned" if tuning["ratio"] else ""
        told["tuning"] = f"{searched}{ratio}; kept: {tuning['kept']}"
    return told


def _range(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def kernels_of(facts: Mapping[str, Any]) -> int | None:
    """How many there are in one inference, of a backend that says so: their number, or that of each kind."""
    kernels = facts.get("kernels")
    return sum(kernels.values()) if isinstance(kernels, Mapping) else kernels


def alarms_of(result: Mapping[str, Any]) -> list[str]:
    """What will not run as it was meant to, in words; result: of an engine that was compiled here."""
    names = result["facts"].get("unscheduled", ())
    slow = [f"no schedule is known for what will run slowly: {', '.join(names)}"] if names else []
    return [*(result["compiled"] or {}).get("alarms", []), *slow]


def _built(result: Mapping[str, Any], engine: Mapping[str, Any]) -> CompiledEngine:
    identity = result["identity"]
    told = {name.replace("_", " "): fact(identity[name]) for name in IDENTITY if identity.get(name) is not None}
    told |= {"asked for by": result["mode"]} if "mode" in result else {}
    told |= {f"refused by {one['mode']}": "; ".join(one["refused"]) for one in result.get("tried", [])}
    told |= {f"command {number}": " ".join(argv) for number, argv in enumerate(result.get("argv", []), start=1)}
    for name, times in result.get("timed", {}).items():
        if "latency" in times:
            told[f"trtexec, {name.replace('_', ' ')}"] = f"median {milliseconds(times['latency']['median'])}"
    return CompiledEngine(
        backend=result["backend"],
        evidence=result["evidence"],
        compiler=f"{result['module']} {result['version']}",
        size_bytes=result["size_bytes"],
        build_seconds=result["seconds"],
        kernels=result["kernels"],
        layers=result["layers"],
        alarms=result["alarms"],
        findings=_findings(engine),
        facts=told,
    )


def _parts(artifacts: Artifacts, subject: str) -> dict[str, str]:
    """What of an inference is copying, where the runner tells the parts apart."""
    measured = artifacts["bench"].result["engines"].get(subject, {}) if "bench" in artifacts else {}
    parts = measured.get("parts_ms", {})
    return {f"{name.replace('_', ' ')}, median": milliseconds(parts[name]) for name in PARTS if name in parts}


def _findings(engine: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{name: row[name] for name in ("node", "reason", "fix")} for row in engine["findings"]]


def claims(artifacts: Artifacts) -> list[Claim]:
    """What the report says of the student's deployment, with the level of each."""
    found = []
    student = engines(artifacts).get("student")
    if student is not None:
        where = f" on {student.facts['device']}" if "device" in student.facts else ""
        rules = "rules of its releases; no compiler was asked: pip install 'edgekd[trt-check]', or build on the board"
        basis = rules if student.evidence == "linted" else student.compiler + where
        found.append(Claim(subject="acceptance", evidence=student.evidence, basis=basis))
        if student.layers:
            found.append(Claim(subject="layers", evidence=student.evidence, basis=basis))
        if student.size_bytes is not None:
            found.append(Claim(subject="engine size", evidence=student.evidence, basis=basis))
        if "bench" not in artifacts and _timed_by_its_builder(artifacts):
            found.append(Claim(subject="latency", evidence=MEASURED, basis=basis))
    if "bench" in artifacts:
        bench = artifacts["bench"].result
        basis = f"{bench['device']['model'] or bench['device']['cpu']}, {bench['url'].partition('?')[0]}"
        found.append(Claim(subject="accuracy", evidence=MEASURED, basis=basis))
        found.append(Claim(subject="latency", evidence=MEASURED, basis=basis))
        if rails := [row["rail"] for row in bench["energy"]["student"]]:
            found.append(Claim(subject="energy", evidence=MEASURED, basis=f"{basis}; rails {', '.join(rails)}"))
    elif "student" in artifacts:
        last = [name for name in ("student", "onnx-student", "quantize") if name in artifacts][-1]
        compiled = "engine-student" in artifacts and "score" in artifacts["engine-student"].result
        basis = f"the artifact {'engine-student' if compiled else last}, on this machine"
        found.append(Claim(subject="accuracy", evidence=MEASURED_ON_HOST, basis=basis))
    return found


def _timed_by_its_builder(artifacts: Artifacts) -> bool:
    built = artifacts.get("build-student")
    return built is not None and any("latency" in times for times in built.result.get("timed", {}).values())


def engine_size(artifacts: Artifacts) -> int | None:
    """Bytes of the student's engine; None where none was made."""
    made = artifacts.get("build-student", artifacts["engine-student"])
    size: int | None = made.result.get("size_bytes")
    return size

"""How each model was compiled, and on what every claim of the report rests."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from edgekd.report.part import Count, Part

BUILT, MEASURED, ON_HOST = "built_on_device", "measured_on_device", "compiled_on_host"
# What may not be claimed of an engine that was not built where it runs, and of one that did not run there.
Subject = Literal["acceptance", "layers", "engine size", "accuracy", "latency", "energy"]
NEEDS_DEVICE: dict[str, tuple[str, ...]] = {
    "engine size": (BUILT, MEASURED, ON_HOST), "latency": (MEASURED,), "energy": (MEASURED,),
}  # fmt: skip


class Claim(Part):
    """Something that the report says, and its level of evidence.

    Levels, from the weakest: linted (rules read off its releases), compiled_by_tensorrt_rtx(version, sm) (its desktop
    sibling's compiler took it), compiled_on_host, measured_on_host, built_on_device, measured_on_device.
    `basis`: what that rests on, for people.
    """

    subject: Subject
    evidence: str = Field(min_length=1)
    basis: str

    @model_validator(mode="after")
    def _enough(self) -> Self:
        allowed = NEEDS_DEVICE.get(self.subject, (self.evidence,))
        if self.evidence not in allowed:
            raise ValueError(f"{self.subject} cannot be claimed as {self.evidence}; needed: {' or '.join(allowed)}")
        return self


class EngineLayer(Part):
    """A layer with weights: the precision that the model asks for, the one that its kernel has, and the kernel."""

    layer: str
    operator: str
    asked: str
    ran: str
    kernel: str = ""


class Finding(Part):
    """What the compiler takes ill at a node of the model."""

    node: str
    reason: str
    fix: str


class CompiledEngine(Part):
    """One model as it was compiled. `layers`: none where the compiler does not list them; `evidence` is theirs.

    `facts`: what else is known of the build, in the words of who made it.
    """

    backend: str
    evidence: str
    compiler: str
    size_bytes: Count | None = None
    build_seconds: float | None = None
    kernels: Count | None = None
    layers: list[EngineLayer] = Field([])
    alarms: list[str] = Field([])
    findings: list[Finding] = Field([])
    facts: dict[str, str] = Field({})

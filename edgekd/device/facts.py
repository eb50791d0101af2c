"""What the agent says of a machine, as `edgekd.agent.machine` finds it; what a machine does not tell is None or ""."""

from __future__ import annotations

from edgekd.documents import Count, Document, Text


class Now(Document):
    """How it is doing."""

    load_average: float | None
    clock_hz: list[Count]
    gpu_clock_hz: Count | None
    gpu_load: float | None
    temperature_c: dict[Text, float]
    throttled: Count | None
    throttle_count: Count


class Facts(Document):
    """What machine it is."""

    model: Text
    soc: Text
    machine: Text
    emulated: bool
    cpu: Text
    cores: Count
    usable_cores: Count
    memory_bytes: Count | None
    memory_available_bytes: Count | None
    disk_free_bytes: Count
    os: Text
    l4t: Text
    kernel: Text
    libc: Text
    virtual: bool
    governors: list[Text]
    max_clock_hz: Count | None
    power_mode: Text
    rails: list[Text]
    python: Text
    interpreter: Text
    numpy: Text | None
    runtimes: dict[Text, Text]
    tensorrt: Text
    trtexec: Text
    agent: Count
    signed_by: Text
    now: Now

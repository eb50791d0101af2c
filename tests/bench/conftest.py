from __future__ import annotations

import numpy as np
import pytest
from bench_engines import null_engine

from edgekd.backends import Engine
from edgekd.bench import benchmark
from edgekd.bench.modes.single_stream import SingleStream
from edgekd.device import Device
from edgekd.tasks import Judge
from edgekd.tasks.classification import Classification


@pytest.fixture
def run(tmp_path):
    """Benchmark two null engines shortly."""

    def benchmark_nulls(student_ms=0.2, teacher_ms=0.6, runner=None, mode=None, launches=6, **options):
        student, teacher = null_engine(tmp_path / "a", student_ms), null_engine(tmp_path / "b", teacher_ms)
        if runner:
            (tmp_path / "own.py").write_text(runner)
            student = Engine("own", student.folder, tmp_path / "own.py", "own")
        samples, judge = np.zeros((12, 1, 4, 4), np.float32), Judge(Classification(), np.arange(12) % 3, (3,))
        device, workdir = Device("local:", tmp_path / "jobs"), tmp_path / "work"
        mode = mode or SingleStream(seconds=0.3)
        return benchmark(
            student, teacher, samples=samples, judge=judge, device=device, workdir=workdir, mode=mode,
            launches=launches, **options,
        )  # fmt: skip

    return benchmark_nulls

"""A report as a run would make it, every number from a seeded generator or a formula."""

from __future__ import annotations

import hashlib

import numpy as np

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def a_latency(median_ms: float, rss_bytes: int, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    samples = median_ms * rng.lognormal(0, 0.06, 6000)
    samples[rng.random(6000) < 0.004] *= 2.5
    return {
        **{f"p{q}_ms": float(np.percentile(samples, q)) for q in (50, 90, 99)},
        "mean_ms": float(samples.mean()),
        "std_ms": float(samples.std()),
        "n": len(samples),
        "warmup_n": 200,
        "throughput_per_s": float(1000 / samples.mean()),
        "load_ms": 9 * median_ms,
        "peak_rss_bytes": rss_bytes,
        "samples_file": f"samples-{seed}.csv",
        "p90_early_stopping_ms": float(np.percentile(samples, 90.8)),
        "p99_early_stopping_ms": float(np.percentile(samples, 99.4)),
        "import_ms": 310.0,
        "samples_ms": samples.tolist(),
        "samples_time_s": np.linspace(0.2, 59.8, 6000).tolist(),
    }


def a_training(epochs: int, top: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    share = np.arange(1, epochs + 1) / epochs
    accuracy = top * (1 - 0.6 * np.exp(-5 * share)) + rng.normal(0, 0.004, epochs)
    return {
        "epochs": [
            {
                "epoch": i + 1,
                "train_loss": float(2.3 * np.exp(-2.2 * share[i]) + 0.05),
                "train_score": float(min(1, accuracy[i] + 0.03 * share[i])),
                "val_score": float(accuracy[i]),
                "lr": float(0.05 * (1 + np.cos(np.pi * share[i])) / 2),
                "seconds": 11.5,
            }
            for i in range(epochs)
        ]
    }


def a_matrix(recall: float, seed: int, k: int = len(CLASSES), samples: int = 1000) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    rows = []
    for true in range(k):
        shares = rng.dirichlet(np.full(k, 0.4)) * (1 - recall)
        shares[true] += recall
        rows.append(rng.multinomial(samples, shares / shares.sum()).tolist())
    return rows


def a_layer(index: int) -> dict:
    rng = np.random.default_rng(index)
    mu, sigma, k = 0.1 * index - 0.2, 0.8 + 0.05 * index, 8
    cuts = mu + sigma * (6 * np.arange(1, k) / k - 3)
    slopes = (np.arange(k) >= k // 2) + rng.normal(0, 0.15, k)
    biases = rng.normal(0, 0.08, k)
    x = np.sort(np.concatenate((np.linspace(mu - 4 * sigma, mu + 4 * sigma, 65), cuts, np.nextafter(cuts, np.inf))))
    segment = np.searchsorted(cuts, x)
    inputs = rng.normal(mu, sigma, 20_000)
    counts = np.histogram(inputs, 40, (x[0], x[-1]))[0]
    return {
        "name": f"features.block{index}.activation",
        "kind": "lma",
        "k": k,
        "continuous": False,
        "mu": mu,
        "sigma": sigma,
        "cuts": cuts.tolist(),
        "slopes": slopes.tolist(),
        "biases": biases.tolist(),
        "max_jump": float(np.abs(np.diff(slopes) * cuts + np.diff(biases)).max()),
        "x": x.tolist(),
        "y": (slopes[segment] * x + biases[segment]).tolist(),
        "histogram": {
            "low": x[0],
            "high": x[-1],
            "counts": counts.tolist(),
            "below": int((inputs < x[0]).sum()),
            "above": int((inputs > x[-1]).sum()),
        },
    }


def a_row(rung: str, score: float, n: int = 10_000, **rest) -> dict:
    half = 1.96 * float(np.sqrt(score * (1 - score) / n))
    return {"rung": rung, "score": score, "n": n, "ci95": [score - half, min(1, score + half)], **rest}


def a_quantization() -> dict:
    """Everything that a quantization can have to tell: a search, advice, warnings, findings, and layers in float."""
    names = [
        "stem",
        *(f"stages.{stage}.{block}.conv{i}" for stage in range(3) for block in (0, 1) for i in (1, 2)),
        "fc",
    ]
    bad, kept, fell_out = "stages.1.0.conv2", "stem", "stages.2.1.conv1"
    advice = f"A few large values stretch the input range of {bad}: calibrate with percentile or entropy."
    layers = [
        {
            "layer": name,
            "quantized": name != kept,
            "weights_sqnr_db": 200.0 if name == kept else 44 - 0.5 * i,
            "weights_cosine": 1.0 if name == kept else 0.9999,
            "input_sqnr_db": None if name == kept else 14.5 if name == bad else 38 - 0.3 * i,
            "input_clipped": None if name == kept else 0.0001 * i,
            "output_sqnr_db": 200.0 if name == kept else 12.5 if name == bad else 36 - 1.2 * i,
            "output_cosine": 1.0 if name == kept else 0.9995 - 0.0003 * i,
            "suggestion": advice if name == bad else "",
        }
        for i, name in enumerate(names)
    ]
    lma = [
        {
            "layer": f"stages.{i}.0.act",
            "max_jump": 0.1 + 0.2 * i,
            "step": None if i == 0 else 0.03 * i,
            "changed_segment": 0.004 * i,
            "low": -3.5 - i,
            "high": 4.5 + i,
            "range_low": -3.0 - 0.1 * i,
            "range_high": 3.0 + 0.2 * i,
            "outside": 0.002 * (3 - i),
        }
        for i in range(3)
    ]
    changes = [-0.012, 0.004, 0.0, -0.003, 0.0, -0.021, 0.006, 0.0, 0.025, None]
    return {
        "method": "ptq",
        "precision": "int8",
        "options": {"calibrate": "auto", "percentile": 99.99, "keep_float": [], "auto_mixed": True},
        "calibration": {
            "source": "train",
            "n": 500,
            "seed": 3,
            "sha256": digest("pixels"),
            "class_counts": {name: 0 if i == 9 else 50 + i for i, name in enumerate(CLASSES)},
        },
        "calibrate": {
            "method": "percentile",
            "percentile": 99.99,
            "tried": [
                {"method": "minmax", "percentile": None, "score": 0.912, "logits_sqnr_db": 17.3},
                {"method": "percentile", "percentile": 99.99, "score": 0.918, "logits_sqnr_db": 21.9},
            ],
            "n": 5000,
            "float_score": 0.9204,
            "score": 0.918,
        },
        "accuracy": {
            "n": 10_000,
            "float_score": 0.9198,
            "score": 0.9197,
            "float_ci95": [0.9143, 0.9249],
            "ci95": [0.9142, 0.9249],
            "change": {"value": -0.0001, "ci95": [-0.0016, 0.0014], "p_value": 0.95},
        },
        "size": {"float_bytes": 1_121_000, "bytes": 301_000},
        "layers": layers,
        "lma": lma,
        "classes": [
            {
                "class": name,
                "n": 0 if change is None else 1000,
                "float_score": None if change is None else 0.92,
                "score": None if change is None else 0.92 + change,
                "change": change,
            }
            for name, change in zip(CLASSES, changes, strict=True)
        ],
        "still_float": [kept, fell_out],
        "keep_float": [kept],
        "search": {
            "keep_float": [kept],
            "score": 0.918,
            "float_score": 0.9204,
            "met": True,
            "out_of_time": True,
            "tried": [
                {"keep_float": 0, "score": 0.871},
                {"keep_float": 7, "score": 0.919},
                {"keep_float": 1, "score": 0.918},
            ],
            "sensitivity_db": {name: 19.5 + 2 * i for i, name in enumerate(names)},
        },
        "findings": [
            {
                "node": "add_3",
                "rule": "branch",
                "effect": "slow",
                "reason": "both of its inputs are rounded",
                "fix": "round the skip input alone",
            }
        ],
        "agreement": {"n": 10_000, "agreement": 0.9997, "max_difference": 0.031},
        "warnings": ["no calibration image shows truck"],
        "suggestions": [advice, "Train with rounding (QAT) to win back more."],
    }


def a_mode(name: str) -> dict:
    """What each mode finds, in full."""
    return {
        "single_stream": {"name": "single_stream"},
        "multi_stream": {
            "name": "multi_stream",
            "samples_per_query": 8,
            "batched": {"student": True, "teacher": False},
        },
        "offline": {
            "name": "offline",
            "sweep": {"student": a_sweep(4.3, 0.6), "teacher": a_sweep(18.6, 0.97)},
            "best_batch": {"student": 32, "teacher": 32},
        },
        "fps": {
            "name": "fps",
            "fps": 60.0,
            "models": {"student": frames(0, 4.3, 0.2), "teacher": frames(1791, 18.6, 512.0)},
        },
        "sustained": a_hot_run(),
    }[name]


def a_sweep(first_ms: float, share: float) -> list[dict]:
    """Every further sample of a batch costs `share` of the first one."""
    rows = []
    for batch in (1, 2, 4, 8, 16, 32):
        ms = first_ms * (1 + share * (batch - 1))
        row = {"batch": batch, "p50_ms": ms, "p90_ms": 1.04 * ms, "throughput_per_s": 1e3 * batch / ms, "queries": 900}
        rows.append(row)
    return rows


def frames(missed: int, ms: float, waited_ms: float) -> dict:
    share = missed / 1800
    return {
        "frames": 1800, "missed": missed, "missed_share": share, "ci95": [max(0, share - 0.002), min(1, share + 0.002)],
        "computing_p50_ms": ms, "waited_p99_ms": waited_ms, "busy_share": ms * 60 / 1e3, "highest_fps": 1e3 / ms,
    }  # fmt: skip


def a_hot_run() -> dict:
    """Twenty windows in which the student slows down with the temperature, and ends behind the teacher."""
    windows = []
    for i in range(20):
        student, teacher = 4.3 * (1 + 0.09 * i), 8.0 * (1 + 0.005 * i)
        ratio = teacher / student
        windows.append(
            {
                "start_s": 30.0 * i, "end_s": 30.0 * i + 29.5, "p50_ms": {"student": student, "teacher": teacher},
                "rank": ["student", "teacher"] if ratio > 1 else ["teacher", "student"],
                "speedup": {"value": ratio, "ci95": [0.98 * ratio, 1.02 * ratio]},
                "temperature_c": 85 - 35 * 0.85**i, "clock_hz": 2.4e9 - 4e7 * i,
            }
        )  # fmt: skip
    return {
        "name": "sustained",
        "windows": windows,
        "slower": {"student": 1.71, "teacher": 0.095},
        "throttling": ["throttled: the firmware throttled the board"],
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def an_engine(layers: int) -> dict:
    """As a board that builds its engines itself leaves it: one layer in float, one kernel per layer."""
    return {
        "backend": "tensorrt",
        "evidence": "built_on_device",
        "compiler": "tensorrt 10.3.0",
        "size_bytes": 335_000,
        "build_seconds": 41.5,
        "kernels": layers + 3,
        "layers": [
            {"layer": f"conv{i}", "operator": "Conv", "asked": "int8", "ran": "fp16" if i == 1 else "int8",
             "kernel": f"conv{i} + relu{i}"}
            for i in range(layers)
        ],
        "alarms": [f"1 of {layers} layers that ask for INT8 run in float: conv1"],
        "findings": [{"node": "pool", "reason": "both inputs are rounded", "fix": "round the skip input alone"}],
        "facts": {"device": "Orin", "asked for by": "strongly typed"},
    }  # fmt: skip


def a_report() -> dict:
    """The JSON of a run with every part in it."""
    teacher, student = a_latency(18.6, 168_000_000, 1), a_latency(4.3, 61_000_000, 2)
    ratio = teacher["p50_ms"] / student["p50_ms"]
    small = {"params": 272_474, "macs": 40_550_000}
    rows = [
        a_row("teacher", 0.9312, agreement_with_teacher=1.0, size_bytes=6_920_000, params=1_730_714, macs=254_000_000),
        a_row("scratch", 0.9041, agreement_with_teacher=0.918, size_bytes=1_110_000, **small),
        a_row("student", 0.9198, agreement_with_teacher=0.951, size_bytes=1_110_000, **small),
        a_row("onnx", 0.9198, agreement_with_teacher=0.951, size_bytes=1_121_000, **small),
        a_row("quantized", 0.9197, agreement_with_teacher=0.948, size_bytes=301_000, **small),
        {"rung": "engine", "reason": "built on the device; see the row below", "size_bytes": 335_000},
        a_row("device", 0.9197, agreement_with_teacher=0.948, size_bytes=335_000, **small),
    ]
    time_s = np.arange(0, 60, 0.5)
    return {
        "schema_version": 1,
        "run_id": "2026-11-21-1304-quick-otter",
        "created": "2026-11-21T13:04:10+00:00",
        "command": "edgekd run cifar10-lma --target raspberry-pi-5 --set data.path=/data/cifar10 --set seed=3",
        "recipe": {
            "schema_version": 1,
            "data": {"source": "parquet", "path": "/data/cifar10", "validation": 0.1, "normalize": True},
            "student": {"network": "lma_student", "activation": {"lma": {"k": 8, "continuous": False}}},
            "distill": {"method": "kd", "temperature": 2.0, "kd_weight": 0.7, "epochs": 60, "betas": [0.9, 0.999]},
            "quantize": {"method": "ptq", "calibrate": "auto", "auto_mixed": True},
            "seed": 3,
        },
        "target": {"name": "raspberry-pi-5", "backend": "onnxruntime", "threads": 4, "device": "ssh://pi@pi5.local"},
        "verdict": {
            "status": "VALID",
            "reasons": [],
            "budgets": [
                {"name": "p99_ms", "limit": 8.0, "value": student["p99_ms"], "met": student["p99_ms"] <= 8.0},
                {"name": "size_bytes", "limit": 2_000_000, "value": 335_000, "met": True},
                {"name": "accuracy_drop", "limit": 0.01, "value": 0.0115, "met": False},
                {"name": "speedup", "limit": 3.0, "value": ratio, "met": ratio >= 3, "bound": "at least"},
            ],
            "speedup": {
                "value": ratio,
                "ci95": [ratio * 0.985, ratio * 1.014],
                "by_launch": (ratio * (1 + 0.01 * np.sin(np.arange(9) - 4))).tolist(),
            },
            "accuracy_change": {"value": -0.0115, "ci95": [-0.0162, -0.0068], "p_value": 0.0000012},
        },
        "ladder": rows,
        "attack": {
            "epsilon": 8.0,
            "step_size": 2.0,
            "steps": 20,
            "sanity_epsilon": 128.0,
            "networks": [
                {
                    "network": name,
                    "top1": top1,
                    "robust_top1": robust,
                    "robust_ci95": [robust - 0.01, robust + 0.01],
                    "sanity_top1": 0.001,
                    "n": 10_000,
                }
                for name, top1, robust in (("teacher", 0.93, 0.31), ("scratch", 0.904, 0.28), ("student", 0.92, 0.35))
            ],
            "warnings": ["The teacher hides its gradient."],
        },
        "latency": {"student": student, "teacher": teacher},
        "mode": a_mode("sustained"),
        "training": {
            "teacher": a_training(40, 0.93, 1),
            "scratch": a_training(60, 0.904, 2),
            "student": a_training(60, 0.92, 3),
        },
        "confusion": {"classes": CLASSES, "student": a_matrix(0.92, 1), "teacher": a_matrix(0.93, 2)},
        "activation": [a_layer(index) for index in range(6)],
        "quantization": a_quantization(),
        "engines": {"student": an_engine(5), "teacher": an_engine(9) | {"alarms": [], "findings": []}},
        "evidence": [
            {"subject": "acceptance", "evidence": "built_on_device", "basis": "tensorrt 10.3.0 on Orin"},
            {"subject": "latency", "evidence": "measured_on_device", "basis": "Orin"},
        ],
        "telemetry": {
            "time_s": time_s.tolist(),
            "series": {
                "cpu_temperature_c": (48 + 9 * (1 - np.exp(-time_s / 20))).tolist(),
                "cpu_hz": [2.4e9] * len(time_s),
                "foreign_cpu_share": (0.02 + 0.01 * np.sin(time_s / 5)).tolist(),
            },
        },
        "environment": {
            "edgekd": "0.1.0",
            "host": {"os": "Debian GNU/Linux 12", "python": "3.11.2", "torch": "2.13.0", "cpu": "x86-64", "cores": 2},
            "device": {
                "model": "Raspberry Pi 5 Model B Rev 1.0",
                "os": "Debian GNU/Linux 12 (bookworm)",
                "kernel": "6.6.51+rpt-rpi-2712",
                "governor": "performance",
                "memory_bytes": 8_445_000_000,
                "onnxruntime": {"version": "1.31.1", "providers": ["CPUExecutionProvider"]},
            },
            "git": {"commit": digest("commit")[:40], "dirty": False},
            "seeds": {"data": 3, "teacher": 3, "student": 3},
        },
        "artifacts": [
            {
                "stage": stage,
                "key": digest("key " + stage),
                "sha256": digest(stage),
                "size_bytes": 1_120_000 + 1000 * i,
                "files": [f"{stage}.safetensors", "metrics.jsonl"],
            }
            for i, stage in enumerate(("teacher", "scratch", "student", "onnx-student", "quantize", "bench"))
        ],
        "notes": ["The board was cooled by its active cooler; ambient temperature was not measured."],
    }

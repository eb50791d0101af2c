"""Pruned students on the digits at equal budget; and what smaller networks are worth in ONNX Runtime.

    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/pruning.py [--seeds 0 1 2] > FILE
    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/pruning.py --latency >> FILE
    PYTHONPATH=benchmarks:benchmarks/methods python benchmarks/methods/pruning.py --report FILE [FILE ...]

Teacher, data, epochs and batches of a seed are the same for all rows.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from every_method import BUDGET, EPOCHS, IMAGES, TEACHER, TEACHER_BUDGET, accuracy, network, train
from results import spread, spread_of, summary, table, write_section
from torch import nn
from torch.nn.functional import cross_entropy

from edgekd import data, export, networks, registry
from edgekd.data import Dataset, Shape
from edgekd.methods import Setting, Step
from edgekd.methods.attacks import Ball, evaluating, pgd
from edgekd.methods.pruning import ChannelGroups

EPSILON, STEPS = 16.0, 10
ATTACK = {"epsilon": EPSILON, "step_size": 4.0, "steps": 3}
WHOLE, SMALL = {"depth": 8, "width": 0.5}, {"depth": 8, "width": 0.25}
NO_ATTACK: dict[str, Any] = {"steps": 0}
# Row: method, its options, network.
ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "scratch": ("scratch", {}, WHOLE),
    "kd": ("kd", {}, WHOLE),
    "kd, half the width": ("kd", {}, SMALL),
    "robust_prune, no attack": ("robust_prune", {**NO_ATTACK, "sparsity": 0.5}, WHOLE),
    "decorrelated_prune": ("decorrelated_prune", {"macs": 0.5}, WHOLE),
    "ard": ("ard", ATTACK, WHOLE),
    "ard, half the width": ("ard", ATTACK, SMALL),
    "robust_prune": ("robust_prune", {**ATTACK, "sparsity": 0.5}, WHOLE),
    "robust_prune, no penalty": ("robust_prune", {**ATTACK, "sparsity": 0.5, "penalty": 0.0}, WHOLE),
}
ROUNDS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--latency", action="store_true", help="time smaller networks instead of training")
    parser.add_argument("--report", type=Path, nargs="+", help="what runs have printed: write docs/results.md from it")
    given = parser.parse_args()
    if given.report:
        lines = [json.loads(line) for file in given.report for line in file.read_text(encoding="utf-8").splitlines()]
        timed, trained = ([line for line in lines if key in line] for key in ("latency", "row"))
        made = "Made by `benchmarks/methods/pruning.py`."
        write_section("methods_pruning", "Pruned students", f"{accuracies(trained)}\n\n{speeds(timed)}\n\n{made}")
    elif given.latency:
        for line in latencies():
            print(json.dumps(line), flush=True)
    else:
        for seed in given.seeds:
            run(seed)


def run(seed: int) -> None:
    many, few = data.load("digits", {}), data.load("digits", {}, train_limit=IMAGES)
    teacher = network(TEACHER, many, seed)
    train(teacher, many, TEACHER_BUDGET, "scratch", {}, None, seed)
    print(json.dumps({"seed": seed, "row": "teacher", **measured(teacher, few)}), flush=True)
    for row, (method, options, size) in ROWS.items():
        student = network(size, few, seed)
        train(student, few, BUDGET, method, options, teacher, seed)
        if row == "kd":
            for name, score in unhealed(student, few).items():
                print(json.dumps({"seed": seed, "row": name, "unhealed": score}), flush=True)
        networks.shrink(student, torch.from_numpy(few.normalize(few.train.images[:2])))
        print(json.dumps({"seed": seed, "row": row, **measured(student, few)}), flush=True)


def measured(student: nn.Module, dataset: Dataset) -> dict[str, float]:
    """In percent, on the test images: told right, and under attack; with the network's size."""
    x, y = torch.from_numpy(dataset.normalize(dataset.test.images)), torch.from_numpy(dataset.test.labels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    torch.manual_seed(0)
    with evaluating(student):
        attacked = pgd(lambda one: cross_entropy(student(one), y), x, Ball.of(EPSILON, EPSILON / 4, mean, std), STEPS)
        with torch.no_grad():
            robust = float((student(attacked).argmax(1) == y).float().mean())
    size = {"params": networks.count_params(student), "macs": networks.count_macs(student, dataset.shape)}
    return {"score": accuracy(student, dataset), "robust": 100 * robust, **size}


def unhealed(student: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Accuracy right after half of the multiplications are gone: components, and channels of the least weights."""
    x, y = torch.from_numpy(dataset.normalize(dataset.train.images)), torch.from_numpy(dataset.train.labels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
    example = x[:2]
    whole = networks.count_macs(student, dataset.shape)
    by_components = copy.deepcopy(student)
    method = registry.create("method", "decorrelated_prune", options={"macs": 0.5})
    method.attach(by_components, None, Setting(example, y, dataset.num_classes, mean, std, 1, lambda n: x[:n]))
    step = Step(x, y, progress=0.5, student=by_components, teacher=lambda: student(x))
    method(step)
    method.constrain(by_components, step_size=0.0, progress=0.5)
    groups = ChannelGroups(student, example)
    best = student
    for share in np.linspace(0.05, 0.7, 27):  # the first share of the channels that leaves no more than half
        by_channels = copy.deepcopy(student)
        groups.scale(by_channels, groups.strongest(groups.strength(student), float(share)))
        smaller = copy.deepcopy(by_channels).eval()
        networks.shrink(smaller, example)
        best = by_channels
        if networks.count_macs(smaller, dataset.shape) <= 0.5 * whole:
            break
    return {
        "unhealed, components": accuracy(recalibrated(by_components, x), dataset),
        "unhealed, channels": accuracy(recalibrated(best, x), dataset),
    }


def recalibrated(student: nn.Module, x: torch.Tensor) -> nn.Module:
    """With the statistics of batch normalisation that it has now."""
    student.train()
    with torch.no_grad():
        for _ in range(40):
            student(x)
    return student.eval()


def latencies() -> list[dict[str, Any]]:
    """ResNet-20 for 32x32 images, whole, without half of its channels, and factored to half of its multiplications."""
    shape, lines = Shape(3, 32, 32), []
    x = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        built = {}
        for name in ("whole", "half of the channels", "half of the multiplications"):
            student = networks.build("resnet", {"depth": 20}, shape, 10, ("relu", {}), 0).eval()
            if name == "half of the channels":
                groups = ChannelGroups(student, x[:2])
                groups.scale(student, groups.strongest(groups.strength(student), 0.5))
            elif name == "half of the multiplications":
                method = registry.create("method", "decorrelated_prune", options={"macs": 0.5})
                setting = Setting(
                    x[:2], torch.zeros(8).long(), 10, torch.zeros(3, 1, 1), torch.ones(3, 1, 1), 1, lambda n: x[:n]
                )
                method.attach(student, None, setting)
                method(
                    Step(x, torch.zeros(8).long(), progress=0.5, student=student, teacher=lambda: torch.zeros(8, 10))
                )
                method.constrain(student, step_size=0.0, progress=0.5)
            networks.shrink(student, x[:2])
            file = Path(folder, f"{len(built)}.onnx")
            export.export(
                student, file, example=x[:1].numpy(), opset=20, form="where", dynamic_batch=False, metadata={}
            )
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = options.inter_op_num_threads = 1
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            built[name] = session
            lines.append({"latency": name, "bytes": file.stat().st_size, "params": networks.count_params(student),
                          "macs": networks.count_macs(student, shape)})  # fmt: skip
        rounds = [
            {name: milliseconds(session, x[:1].numpy()) for name, session in built.items()} for _ in range(ROUNDS)
        ]
    for line in lines:
        ratios = [round_[line["latency"]] / round_["whole"] for round_ in rounds]
        line |= summary(ratios) | {"ms": statistics.median(round_[line["latency"]] for round_ in rounds)}
    return lines


def milliseconds(session: onnxruntime.InferenceSession, x: Any) -> float:
    """The quickest of ten inferences: on a machine that others use, most of a mean is theirs."""
    durations = []
    for _ in range(10):
        start = time.perf_counter()
        session.run(None, {"images": x})
        durations.append(time.perf_counter() - start)
    return 1000 * min(durations)


def accuracies(lines: list[dict[str, Any]]) -> str:
    trained = [line for line in lines if "score" in line]
    seeds = sorted({line["seed"] for line in trained})
    rows = []
    for name in ("teacher", *ROWS):
        found = [line for line in trained if line["row"] == name]
        scores = [[line[key] for line in found] for key in ("score", "robust")]
        sizes = [f"{statistics.mean(line[key] for line in found):,.0f}" for key in ("params", "macs")]
        rows.append([name, *(spread_of(one, 1) for one in scores), *sizes])
    said = []
    for kind in ("components", "channels"):
        scores_after = [line["unhealed"] for line in lines if line["row"] == f"unhealed, {kind}"]
        said.append(f"{kind} {spread_of(scores_after, 1)}")
    return (
        f"Test accuracy in percent, mean ± standard deviation over {len(seeds)} seeds. Students are ResNet-8 of half"
        f" the width, or a quarter where the row says half, trained for {EPOCHS} epochs on {IMAGES} images by a"
        f" ResNet-14. Under attack: PGD of {STEPS} steps, epsilon {EPSILON:g}/255; in training {ATTACK['steps']}"
        " steps. Parameters and multiply-accumulates are those of the network that is exported.\n\n"
        + table(["method", "accuracy", "under attack", "parameters", "MACs"], rows)
        + "\n\nRight after half of the multiply-accumulates of the student `kd` are gone, without training on, with the"
        f" statistics of batch normalisation measured anew: {'; '.join(said)}."
    )


def speeds(lines: list[dict[str, Any]]) -> str:
    rows = [
        [line["latency"], f"{line['params']:,}", f"{line['macs'] / lines[0]['macs']:.2f}", f"{line['bytes']:,}",
         f"{line['ms']:.2f}", spread(line)]
        for line in lines
    ]  # fmt: skip
    return (
        "ResNet-20 on 32x32 in ONNX Runtime, one thread, the networks in turns; the ratio's median over"
        f" {ROUNDS} rounds, with its 10th and 90th percentile:\n\n"
        + table(["network", "parameters", "MACs, ratio", "ONNX, bytes", "ms", "latency, ratio"], rows)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

"""What a training step costs with each activation, as a ratio to the same step with ReLU.

Student 3 of the LMA paper on random 32x32 images: forward, loss, backward, SGD step. The contenders take turns within
a round, so that a busy machine slows them all; a ratio is taken per round, and its median, 10th and 90th percentile
are given. "lma" is what edgekd trains with; the rows after "lma continuous" are other ways to compute the same.

    python benchmarks/lma_step.py [--batch 64] [--rounds 15] [--threads 1] [--device cpu] [--compiled] [--report]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from results import spread, summary, table, write_section
from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.activations import LMA, multi_segment_layers
from edgekd.data import Shape
from edgekd.networks import build

STEPS_PER_TURN = 3
SHAPE = Shape(3, 32, 32)


class LookUpLMA(LMA):
    """LMA as its authors wrote it: an index tensor and two look-ups, under autograd."""

    def forward(self, x: Tensor) -> Tensor:
        std, mean = torch.std_mean(x.detach())
        self.running.lerp_(torch.stack((mean, std)), 1 - self.momentum)
        index = ((x.detach() - mean + 3 * std) / (6 * std / self.k)).long().clamp(0, self.k - 1)
        return (self.base_slopes + self.slope_deltas)[index] * x + self.biases[index]


def student(activation: str, **options: object) -> nn.Module:
    return build("lma_student", {"size": 3}, SHAPE, 10, (activation, options), seed=0)


def look_up() -> nn.Module:
    network = student("lma")
    for _, layer in multi_segment_layers(network):
        layer.__class__ = LookUpLMA
    return network


def compiled_lma() -> nn.Module:
    network = student("lma")
    for _, layer in multi_segment_layers(network):
        layer.compile()
    return network


def whole(network: nn.Module) -> nn.Module:
    network.compile()
    return network


CONTENDERS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: student(name) for name in ("relu", "prelu", "swish", "aplu", "lma")},
    "lma continuous": lambda: student("lma", continuous=True),
    "lma, plain torch": lambda: student("lma"),
    "lma, look-ups": look_up,
}
COMPILED: dict[str, Callable[[], nn.Module]] = {
    "lma, layer under torch.compile": compiled_lma,
    "relu, network under torch.compile": lambda: whole(student("relu")),
    "lma, network under torch.compile": lambda: whole(student("lma")),
}


def stepper(name: str, network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], float]:
    """A function that trains a few steps and gives the seconds of one."""
    network.to(x.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=2.2e-4)
    without_kernel = mock.patch("edgekd.activations.segments._kernel_for", return_value=None)

    def turn() -> float:
        with without_kernel if "plain" in name else contextlib.nullcontext():
            start = time.perf_counter()
            for _ in range(STEPS_PER_TURN):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(network(x), y).backward()
                optimizer.step()
            if x.is_cuda:
                torch.cuda.synchronize()
            return (time.perf_counter() - start) / STEPS_PER_TURN

    return turn


def measure(batch: int, rounds: int, device: str, compiled: bool) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    x = torch.randn(batch, SHAPE.channels, SHAPE.height, SHAPE.width, device=device)
    y = torch.randint(10, (batch,), device=device)
    contenders = CONTENDERS | (COMPILED if compiled else {})
    turns = {name: stepper(name, make(), x, y) for name, make in contenders.items()}
    for turn in turns.values():
        turn()
    seconds = [{name: turn() for name, turn in turns.items()} for _ in range(rounds)]
    rows = {}
    for name in turns:
        ratios = [took[name] / took["relu"] for took in seconds]
        rows[name] = summary(ratios) | {"step_ms": 1e3 * statistics.median(took[name] for took in seconds)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile, which takes minutes to compile")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    rows = measure(asked.batch, asked.rounds, asked.device, asked.compiled)
    if asked.json:
        print(json.dumps({**vars(asked), "torch": torch.__version__, "rows": rows}, indent=1))
        return
    about = f"student 3, batch {asked.batch}, {asked.device}, {asked.threads} thread(s), {asked.rounds} rounds"
    print(about)
    for name, row in rows.items():
        print(f"{name:36} {spread(row)}  {row['step_ms']:7.1f} ms")
    if asked.report:
        body = table(["activation", "ratio to ReLU"], [[name, spread(row)] for name, row in rows.items()])
        body = f"Wall time of a whole training step; {about}, in turns.\n\n{body}\n\nMade by `benchmarks/lma_step.py`."
        write_section("lma_step", "What a training step costs", body)


if __name__ == "__main__":
    main()

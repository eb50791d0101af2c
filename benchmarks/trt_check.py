"""What the compiler of TensorRT-RTX makes of every network, precision and activation, without a GPU.

Whether it accepts the model for Ampere, how many of its convolutions run in the precision that was asked for, and how
many kernels the whole network takes. Random weights and segments (neither changes the engine), 32x32 images, batch 1.
Nothing is timed: kernels are counted, and the counts are the same in every run.

    python benchmarks/trt_check.py [--json] [--report]          (needs the extra trt-check)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from results import table, write_section
from torch import nn

from edgekd import activations, export, networks
from edgekd.backends.tensorrt import TensorRT, built, compiler
from edgekd.data import Shape
from edgekd.quantize import half, ptq

IMAGE = (3, 32, 32)
NETWORKS = {
    "LMA student 3": ("lma_student", {"size": 3}),
    "LMA teacher": ("lma_teacher", {}),
    "ResNet-8": ("resnet", {"depth": 8}),
    "ResNet-20": ("resnet", {"depth": 20}),
    "WRN-16-1": ("wrn", {"depth": 16, "k": 1}),
    "MobileNetV2 x 0.25": ("mobilenet_v2", {"width": 0.25}),
}
ACTIVATIONS = {
    "ReLU": ("relu", {}),
    "LMA": ("lma", {"k": 8}),
    "LMA continuous": ("lma", {"k": 8, "continuous": True}),
}
PRECISIONS = ("fp32", "fp16", "int8")
FORMS_NETWORK = "LMA student 3"


def model(folder: Path, network: str, activation: str, form: str) -> dict[str, Path]:
    """The network in a form, as a file for each precision."""
    name, options = NETWORKS[network]
    built = networks.build(name, options, Shape(*IMAGE), 10, ACTIVATIONS[activation], 0).eval()
    torch.manual_seed(0)
    for _, layer in activations.multi_segment_layers(built):
        nn.init.normal_(layer.slope_deltas, 0, 0.2)
        nn.init.normal_(layer.biases, 0, 0.05)
    files = {precision: folder / f"{precision}.onnx" for precision in PRECISIONS}
    image = np.zeros((1, *IMAGE), np.float32)
    export.export(built, files["fp32"], example=image, opset=20, dynamic_batch=False, form=form, metadata={})
    images = np.random.default_rng(0).standard_normal((8, *IMAGE)).astype(np.float32)
    half.quantize(files["fp32"], files["fp16"], images)
    ptq.quantize(files["fp32"], files["int8"], images)
    return files


def cases() -> Iterator[tuple[str, str, str]]:
    """(network, activation, form): each network in the backend's forms, one network in all forms."""
    for network in NETWORKS:
        for activation in ACTIVATIONS:
            chosen = TensorRT.forms["continuous" if activation == "LMA continuous" else "any"]
            for form, spelling in activations.FORMS.items():
                possible = activation == "LMA continuous" or (activation == "LMA" and spelling.exact_for == "any")
                if form == chosen or (possible and network == FORMS_NETWORK):
                    yield network, activation, form


def measure(network: str, activation: str, form: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for precision, file in model(Path(folder), network, activation, form).items():
            found = compiler.compiled(file, Path(folder, "compiler.log"), precision=precision)
            convolutions = [
                row for row in built.layer_rows(onnx.load(file), found.kernels) if "Conv" in row["operator"]
            ]
            yield {
                "network": network, "activation": activation, "form": form, "precision": precision,
                "compiler": found.compiler, "sm": found.sm, "refused": found.refused,
                "convolutions": len(convolutions), "as_asked": sum(row["ran"] == precision for row in convolutions),
                "kernels": len(found.kernels),
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--report", action="store_true", help="write docs/results.md")
    asked = parser.parse_args()
    rows = []
    for case in cases():
        for row in measure(*case):
            rows.append(row)
            if not asked.json:
                print(*case, row["precision"], cell(row), *row["refused"], flush=True)
    if asked.json:
        print(json.dumps(rows, indent=1))
    if asked.report:
        write_section("trt_check", "What TensorRT's compiler makes of the networks", report(rows))


def cell(row: dict[str, Any]) -> str:
    """`7 of 7 INT8, 17 kernels`."""
    if row["refused"]:
        return "refused"
    return f"{row['as_asked']} of {row['convolutions']} {row['precision'].upper()}, {row['kernels']} kernels"


def report(rows: list[dict[str, Any]]) -> str:
    chosen = {
        "ReLU": TensorRT.forms["any"],
        "LMA": TensorRT.forms["any"],
        "LMA continuous": TensorRT.forms["continuous"],
    }
    cells = {(row["network"], row["activation"], row["form"], row["precision"]): cell(row) for row in rows}
    networks_table = [
        [f"{network}, {precision}", *(cells[network, name, chosen[name], precision] for name in ACTIVATIONS)]
        for network in NETWORKS
        for precision in PRECISIONS
    ]
    forms_table = [
        [f"`{form}`", *(cells.get((FORMS_NETWORK, name, form, "int8"), "not exact") for name in list(ACTIVATIONS)[1:])]
        for form in activations.FORMS
    ]
    refused = sum(bool(row["refused"]) for row in rows)
    return (
        f"Compiled by {rows[0]['compiler']} for SM {rows[0]['sm']}, without a GPU: {len(rows) - refused} of {len(rows)}"
        " models accepted. Convolutions that run in the precision asked for, of all; kernels of the whole network,"
        " batch 1, k = 8. In fp16 the graph itself says what is half, and LMA stays in float."
        f" LMA with jumps as `{chosen['LMA']}`, continuous as `{chosen['LMA continuous']}`. Counts, not times; TensorRT"
        " on a board may fuse otherwise.\n\n"
        + table(["network, precision", *ACTIVATIONS], networks_table)
        + f"\n\nThe forms of LMA, {FORMS_NETWORK} in INT8:\n\n"
        + table(["form", *list(ACTIVATIONS)[1:]], forms_table)
        + "\n\nMade by `benchmarks/trt_check.py`."
    )


if __name__ == "__main__":
    main()

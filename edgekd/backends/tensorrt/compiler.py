"""The real compiler of the TensorRT family, where there is no GPU: TensorRT-RTX builds for a chip that is not here.

It is the parser and the compiler of TensorRT's desktop sibling. What it refuses, TensorRT on a Jetson refuses too; what
it accepts shows which layers become INT8 kernels and what is fused. It is no proof that an older TensorRT takes the
model, and it says nothing about time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from edgekd.backends import child
from edgekd.backends.tensorrt.on_device import build as device_build
from edgekd.errors import MissingError
from edgekd.quantize.graph import Graph
from edgekd.quantize.rules import layer_name, layers_with_weights

MODULE = "tensorrt_rtx"
EXTRA = "trt-check"
SM = 86  # Ampere with the instructions of Orin's SM 87, which TensorRT-RTX does not build for
TIMEOUT_S = 300.0
# The kernels that multiply. A fused one is called after its steps: what begins with the product computes it on its
# inputs as they are, `CastMulFc` has made floats of INT8 codes before.
_PRODUCT = re.compile(r"corr|conv|gemm|matrix", re.IGNORECASE)
_FUSED_PRODUCT = re.compile(r"__myl_(Corr|Conv|Fc|Gemm)")
_HOST_ONLY = ("shape_call",)
# How an engine is built when nobody asks for anything else; see on_device.build.SETTINGS.
DEFAULTS: dict[str, Any] = {
    "backend": "tensorrt", "threads": 1, "version": "", "module": "tensorrt", "precision": "int8", "max_batch": 1,
    "profile": "", "workspace_bytes": 0, "optimization_level": 3, "dla_core": -1, "compute_capability": "",
    "cuda_graph": False,
}  # fmt: skip

_LAYER = re.compile(
    r"^ ?Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], "
    r"Constants: \[(?P<constants>.*?)\], Outputs: \[(?P<outputs>.*?)\], "
    r"TacticName: (?P<tactic>.*?), StreamId: \d+, Metadata: ?(?P<metadata>.*)$",
    re.MULTILINE,
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Kernel:
    """A row of the engine's layer table: what one launch computes, and in which types."""

    name: str
    type: str
    inputs: tuple[str, ...]  # data types of the activations: Int8, Half, Float
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    tactic: str
    nodes: tuple[str, ...]  # names of the ONNX nodes that it computes, or parts of them

    @property
    def multiplies(self) -> bool:
        """Whether it is a convolution or matrix product, and not what brings values and weights into order for one."""
        fused = self.type == "runtime_fusion"
        return bool(_FUSED_PRODUCT.match(self.name) if fused else _PRODUCT.search(self.type))

    @property
    def multiplies_integers(self) -> bool:
        """Whether it is one of INT8 activations with INT8 weights."""
        return "Int8" in self.inputs and "Int8" in self.constants and self.multiplies


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a model; `refused` says why it made nothing."""

    compiler: str
    sm: int
    refused: tuple[str, ...]
    kernels: tuple[Kernel, ...]

    @property
    def evidence(self) -> str:
        """The level of what this proves, for a report."""
        return f"compiled_by_{self.compiler.replace(' ', '(')}, sm_{self.sm})" if not self.refused else "linted"


def missing() -> str:
    """Why the compiler cannot be used here; empty when it can."""
    if importlib.util.find_spec(MODULE) is None:
        return f"{MODULE} is not installed"
    return ""


def compiled(model: Path, log: Path, *, sm: int = SM, precision: str = "int8", timeout: float = TIMEOUT_S) -> Compiled:
    """Compile an ONNX file for GPUs of compute capability `sm` and read the engine's layer table.

    The compiler runs in a process of its own, all that it prints goes to `log`.

    Raises:
        MissingError: the extra is absent. StageError: the compiler crashed or did not end in time. A model that it
        refuses is no error: `refused` says why.
    """
    if reason := missing():
        raise MissingError(
            f"{model.name} cannot be compiled here: {reason}",
            allowed="wheels: Linux on x86_64; no GPU is needed",
            fix=f"pip install 'edgekd[{EXTRA}]'",
        )
    settings = {**DEFAULTS, "module": MODULE, "precision": precision, "compute_capability": str(sm)}
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        shutil.copyfile(model, Path(folder, device_build.MODEL))
        Path(folder, "engine.json").write_text(json.dumps(settings), encoding="utf-8")
        found = child.result_of(
            [sys.executable, "-m", "on_device", folder],
            Path(folder, device_build.RESULT),
            what=f"{MODULE}, compiling {model}",
            fix="export the model in another form or precision, or compile it on the device",
            timeout=timeout,
            log=log,
            cwd=Path(__file__).parent,
            expected=(0, 1),  # 1: it refuses the model
        )
    kernels = kernels_from_log(log.read_text(encoding="utf-8", errors="replace"))
    compiler = f"{MODULE} {importlib.metadata.version('tensorrt-rtx')}"
    return Compiled(compiler, sm, tuple(found["refused"]), () if found["refused"] else kernels)


def kernels_from_log(text: str) -> tuple[Kernel, ...]:
    """The layer table that the builder prints when it logs all; without what runs on the host."""
    rows = []
    for found in _LAYER.finditer(text):
        types = {name: tuple(_DATATYPE.findall(found[name])) for name in ("inputs", "constants", "outputs")}
        nodes = tuple(_ONNX_NODE.findall(found["metadata"]))
        rows.append(Kernel(found["name"], found["type"], tactic=found["tactic"], nodes=nodes, **types))
    return tuple(row for row in rows if row.type not in _HOST_ONLY)


def kernels_from_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[Kernel, ...]:
    """The same of an engine that was built on a board: the `layers` among the facts of its runner."""
    frozen: list[dict[str, Any]] = [
        {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()} for row in rows
    ]
    return tuple(Kernel(**row) for row in frozen)


@dataclass(frozen=True)
class Account:
    """How much of a model is computed in integers, and in how many kernels."""

    int8_convolutions: int
    convolutions: int
    int8_products: int  # Gemm and MatMul with constant weights
    products: int
    kernels: int
    in_float: tuple[str, ...]  # names of the layers with weights that are not computed in INT8

    def facts(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def account(model: onnx.ModelProto, kernels: tuple[Kernel, ...]) -> Account:
    """Which layers of the model became INT8 kernels. Products inside an LMA are not layers."""
    graph = Graph(model)
    integer = {name for kernel in kernels if kernel.multiplies_integers for name in kernel.nodes}
    layers = list(layers_with_weights(graph))
    in_float = [node for node in layers if node_name(node) not in integer]
    convolutions, float_convolutions = (sum("Conv" in node.op_type for node in nodes) for nodes in (layers, in_float))
    return Account(
        int8_convolutions=convolutions - float_convolutions,
        convolutions=convolutions,
        int8_products=len(layers) - convolutions - (len(in_float) - float_convolutions),
        products=len(layers) - convolutions,
        kernels=len(kernels),
        in_float=tuple(layer_name(node, graph) for node in in_float),
    )


def node_name(node: onnx.NodeProto) -> str:
    """What TensorRT calls an ONNX node."""
    return str(node.name or f"node_of_{node.output[0]}")

"""TensorRT: NVIDIA's compiler and runtime. An engine belongs to the very board that built it."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from edgekd.backends import Backend, write_settings
from edgekd.errors import RecipeError, StageError
from edgekd.registry import register
from edgekd.target import Target

if TYPE_CHECKING:
    import onnx as onnx_package

    from edgekd.quantize.rules import Finding

ON_DEVICE = Path(__file__).with_name("on_device")


@register("backend", "tensorrt")
class TensorRT(Backend):
    """NVIDIA TensorRT on a Jetson: the engine is built on the board, from a model prepared here for its release.

    version: of the board's TensorRT. max_batch: of the engine, where the model's batch size is open. workspace_mib:
    scratch memory that a kernel may take, 0 for what TensorRT takes by itself. dla_core: run on that deep learning
    accelerator where the board has one, the GPU computing what it cannot; -1 for the GPU alone. cuda_graph: launch an
    inference as one graph, which saves time where the kernels are short.
    """

    name = "tensorrt"
    precisions = ("fp32", "fp16", "int8")
    builds_on = "device"
    # In INT8 the compiler makes one kernel of an LMA with the rounding around it, as of a ReLU. The other elementwise
    # forms do so too, but are cut into three in front of the mean over 1280 channels of MobileNetV2; those with matrix
    # products always are. Without rounding, `clip_sum` goes into the convolution's own kernel. See docs/results.md.
    forms: ClassVar = {"any": "gather", "continuous": "clip_sum"}
    runner = Path(__file__).with_name("runner.py")
    built_engine = "model.plan"
    built_files: ClassVar = {"layers.json": 64 << 20, "timing.cache": 256 << 20}

    def __init__(
        self,
        *,
        version: str = "10.3.0",
        max_batch: int = 1,
        workspace_mib: int = 0,
        optimization_level: int = 3,
        dla_core: int = -1,
        cuda_graph: bool = False,
    ) -> None:
        self.version, self.max_batch, self.workspace_mib = version, max_batch, workspace_mib
        self.optimization_level, self.dla_core, self.cuda_graph = optimization_level, dla_core, cuda_graph

    @classmethod
    def on_board(cls, options: Mapping[str, Any], target: Target) -> dict[str, Any]:
        """Raises RecipeError for a deep learning accelerator that the board has not got."""
        cores, asked = target.board.dla_cores if target.board else None, options["dla_core"]
        if cores is not None and asked >= cores:
            raise RecipeError(
                f"{cls.name}.dla_core = {asked}: target {target.name} has {cores} deep learning accelerators",
                allowed=f"allowed: {', '.join(map(str, range(-1, cores)))}; -1 is the GPU alone",
                fix="leave dla_core out, or name another board",
            )
        return dict(options)

    def available(self) -> str:
        """Empty, or why models cannot be prepared here; TensorRT itself is needed on the board alone."""
        return "" if importlib.util.find_spec("onnx") else "onnx not installed: pip install onnx"

    def check(self, onnx: Path) -> list[str]:
        """What this release of TensorRT would reject of the model, once it is prepared."""
        self.require()
        try:
            return [str(finding) for finding in self.findings(onnx) if finding.effect == "rejected"]
        except StageError as error:
            return [error.what]

    def findings(self, onnx: Path) -> list[Finding]:
        """Every finding of the linter, also of what is slow. Raises StageError for what cannot be prepared."""
        from edgekd.backends.tensorrt.linter import lint, lint_for_dla

        model = self._prepared(onnx)
        found = lint(model, self.version)
        return found + lint_for_dla(model, self.version, precision_of(model)) if self.dla_core >= 0 else found

    def examine(self, onnx: Path, log: Path) -> dict[str, Any]:
        """What can be known of a model before the board is reached; ready for JSON.

        Where the extra trt-check is installed, the real compiler builds the prepared model; what it prints is in `log`.

        Returns:
            version, evidence ("linted", or "compiled_by_..."), findings: a row {node, rule, effect, reason, fix} each,
            compiled: None, or {compiler, sm, refused, layers (kernels), precisions (rows {layer, operator, asked, ran,
            kernel}), alarms, and the numbers of `compiler.Account`}.
        """
        self.require()
        import onnx as onnx_package

        from edgekd.backends.tensorrt import built, compiler

        found: dict[str, Any] = {"version": self.version, "evidence": "linted", "compiled": None}
        found["findings"] = [asdict(finding) for finding in self.findings(onnx)]
        if compiler.missing():
            return found
        model = self._prepared(onnx)
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            file = Path(folder, onnx.name)
            onnx_package.save(model, file)
            made = compiler.compiled(file, log, precision=precision_of(model))
        numbers = compiler.account(model, made.kernels).facts() if not made.refused else {}
        rows = built.layer_rows(model, made.kernels) if not made.refused else []
        compiled = {"compiler": made.compiler, "sm": made.sm, "refused": made.refused, **numbers}
        compiled |= {"precisions": rows, "alarms": built.float_alarm(rows)}
        return found | {"evidence": made.evidence, "compiled": compiled | {"layers": [asdict(k) for k in made.kernels]}}

    def compile(self, onnx: Path, out: Path, *, threads: int) -> dict[str, Any]:
        """Write the bundle that builds the engine on the board: model, settings, and the code that does it."""
        self.require()
        import onnx as onnx_package

        from edgekd.backends.tensorrt.compiler import DEFAULTS

        model = self._prepared(onnx)
        onnx_package.save(model, out / "model.onnx")
        shutil.copytree(ON_DEVICE, out / ON_DEVICE.name, ignore=shutil.ignore_patterns("__pycache__"))
        settings = {
            **DEFAULTS,
            "threads": threads,
            "version": self.version,
            "precision": precision_of(model),
            "max_batch": self.max_batch,
            "profile": _profile(model, self.max_batch),
            "workspace_bytes": self.workspace_mib << 20,
            "optimization_level": self.optimization_level,
            "dla_core": self.dla_core,
            "cuda_graph": self.cuda_graph,
        }
        write_settings(out, settings)
        return {
            "runtime": self.name, "version": self.version, "providers": ["built on the device"], "threads": threads,
            "precision": settings["precision"], "opset": model.opset_import[0].version,
        }  # fmt: skip

    def build_commands(self, folder: Path, name: str) -> list[str]:
        """With what is in the folder, or by trtexec as the target's release understands it."""
        from edgekd.backends.tensorrt.on_device import build, trtexec

        settings = build.settings_of(str(folder))
        version = tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])
        argv = [
            trtexec.build_argv("trtexec", version, settings, settings["profile"]),
            *(trtexec.time_argv("trtexec", version, seconds=10, end_to_end=both) for both in (False, True)),
        ]
        said = ["or", "its kernels timed alone", "with the copies in and out"]
        return [
            f"cd {name} && python3 -m on_device . && cd ..",
            *(f"# {what}: cd {name} && {shlex.join(one)} && cd .." for what, one in zip(said, argv, strict=True)),
        ]

    def built(self, folder: Path) -> dict[str, Any]:
        """What the board built: identity, size, the precision of every layer, alarms; see `built.account`."""
        from edgekd.backends.tensorrt import built

        try:
            return built.account(folder)
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise StageError(
                f"what the board's TensorRT left is not understood: {type(error).__name__}: {error}",
                allowed=f"looked in {folder}",
                fix="build again: edgekd compile",
            ) from error

    def _prepared(self, file: Path) -> onnx_package.ModelProto:
        import onnx as onnx_package

        from edgekd.backends import model_file
        from edgekd.backends.tensorrt.prepare import prepared
        from edgekd.quantize.packing import float_from_packed

        model_file.require(file, open_sizes=True)
        model = onnx_package.load(str(file))
        return prepared(float_from_packed(model), self.version)  # packed weights are codes in UINT8


def precision_of(model: onnx_package.ModelProto) -> str:
    """What a model asks to be computed in: int8 where it rounds, fp16 where its constants are, else fp32."""
    import onnx as onnx_package

    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        return "int8"
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    return "fp16" if onnx_package.TensorProto.FLOAT16 in kinds else "fp32"


def _profile(model: onnx_package.ModelProto, max_batch: int) -> str:
    """`images:8x3x32x32`, or nothing where the batch size is fixed."""
    image = model.graph.input[0]
    batch, *rest = (dimension.dim_value for dimension in image.type.tensor_type.shape.dim)
    return "" if batch else f"{image.name}:{'x'.join(map(str, [max_batch, *rest]))}"

"""Builds an engine from the ONNX model in a folder, with TensorRT's Python module.

FOLDER/engine.json says how (`SETTINGS` lists its keys), FOLDER/build.json says afterwards what came of it:

    module, version   what built it: TensorRT's Python module, or trtexec
    mode, tried       how precision was asked for, see `modes`; and what was refused before
    refused           why there is no engine, a sentence each; empty when there is one
    identity          what the engine belongs to, see `identity`
    files             [sha256, bytes] by name of what was made: engine, layer table, timing cache, as far as there are
    seconds           that the build took
    argv, timed       of trtexec: its commands, and the times that it measured
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import shutil
import time
from typing import Any, NamedTuple

MODEL, PLAN, LAYERS, TIMING_CACHE, RESULT = "model.onnx", "model.plan", "layers.json", "timing.cache", "build.json"
# What engine.json must say.
SETTINGS = (
    "backend",
    "threads",
    "version",  # of the TensorRT that the model was prepared for
    "module",  # tensorrt, or tensorrt_rtx
    "precision",  # fp32, fp16, int8
    "profile",  # the input's name and largest shape, "images:8x3x32x32", where the batch size is open; "" where not
    "cuda_graph",  # launch an inference as one graph
    "max_batch",  # of the profile, where the batch size is open
    "workspace_bytes",  # of scratch memory that a kernel may ask for; 0: what the module takes by default
    "optimization_level",  # 0 to 5, where the module has levels
    "dla_core",  # -1: the GPU alone
    "compute_capability",  # "86": build for that chip without a GPU (TensorRT-RTX); "": for the one here
)


class Mode(NamedTuple):
    """One way to ask for a precision: the names of the flags that the network and the builder get."""

    name: str
    network: tuple[str, ...]
    builder: tuple[str, ...]


class RefusedError(Exception):
    """The parser or the builder does not take the model; one sentence per complaint."""

    def __init__(self, reasons: list[str]) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = reasons


def modes(trt: Any, precision: str) -> list[Mode]:
    """How this TensorRT is asked for a precision, the preferred way first. Tested by what the module has.

    11 and TensorRT-RTX read every type from the graph. 10 can do so and can be told to; 8 has only the flags, and reads
    Q/DQ pairs when INT8 is set.
    """
    lower = {"int8": ("INT8", "FP16"), "fp16": ("FP16",), "fp32": ()}[precision]
    flags = Mode("flags", ("EXPLICIT_BATCH",), lower)
    if not hasattr(trt.BuilderFlag, "INT8"):
        return [Mode("types of the graph", (), ())]
    if not hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return [flags]
    return [Mode("strongly typed", ("EXPLICIT_BATCH", "STRONGLY_TYPED"), ()), flags]


def settings_of(folder: str) -> dict[str, Any]:
    """What engine.json says."""
    with open(os.path.join(folder, "engine.json"), encoding="utf-8") as file:
        settings = json.load(file)  # type: dict[str, Any]
    return settings


def module(settings: dict[str, Any]) -> Any:
    """TensorRT. Raises ImportError where it is not."""
    return importlib.import_module(settings["module"])


def build(folder: str, identity: dict[str, Any]) -> dict[str, Any]:
    """Make the engine, try the next mode when one is refused, and write what came of it."""
    settings = settings_of(folder)
    trt = module(settings)
    logger = _logger(trt)
    result = {
        "module": settings["module"], "version": trt.__version__, "identity": identity, "refused": [], "tried": [],
    }  # type: dict[str, Any]  # fmt: skip
    started = time.monotonic()
    for mode in modes(trt, settings["precision"]):
        result["mode"] = mode.name
        try:
            plan = _build(trt, logger, folder, settings, mode)
        except RefusedError as refused:
            result["refused"] = refused.reasons
            result["tried"].append({"mode": mode.name, "refused": refused.reasons})
            continue
        result["refused"] = []
        write(os.path.join(folder, PLAN), plan)
        _write_layers(trt, logger, folder, plan)
        break
    result["seconds"] = time.monotonic() - started
    return finished(folder, result)


def finished(folder: str, result: dict[str, Any]) -> dict[str, Any]:
    """Write build.json and return it; what was refused leaves no engine."""
    made = {name: os.path.join(folder, name) for name in (PLAN, LAYERS, TIMING_CACHE)}
    if result["refused"]:
        for name in (PLAN, LAYERS):
            with contextlib.suppress(OSError):
                os.remove(made[name])
    there = {name: path for name, path in made.items() if os.path.isfile(path)}
    result["files"] = {name: [sha256(path), os.path.getsize(path)] for name, path in there.items()}
    write(os.path.join(folder, RESULT), json.dumps(result, indent=2, sort_keys=True).encode())
    return result


def sha256(path: str) -> str:
    """Digest of a file, read in pieces: a board has little memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    return digest.hexdigest()


def _build(trt: Any, logger: Any, folder: str, settings: dict[str, Any], mode: Mode) -> bytes:
    try:
        builder = trt.Builder(logger)
    except TypeError:  # what the binding makes of "no builder"
        raise RefusedError(logger.errors or ["TensorRT finds no GPU that it can use"]) from None
    network = builder.create_network(_bits(trt.NetworkDefinitionCreationFlag, mode.network))
    parser = trt.OnnxParser(network, logger)
    if settings["dla_core"] >= 0 and hasattr(getattr(trt, "OnnxParserFlag", None), "ADJUST_FOR_DLA"):  # from 11.4 on
        parser.set_flag(trt.OnnxParserFlag.ADJUST_FOR_DLA)
    if not parser.parse_from_file(os.path.join(folder, MODEL)):
        raise RefusedError([_complaint(parser.get_error(index)) for index in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    for name in mode.builder:
        config.set_flag(getattr(trt.BuilderFlag, name))
    _configure(trt, builder, network, config, settings)
    cache = _timing_cache(config, os.path.join(folder, TIMING_CACHE), settings)
    logger.errors = []
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RefusedError(logger.errors or ["the builder made no engine and did not say why"])
    if cache:
        write(os.path.join(folder, TIMING_CACHE), bytes(memoryview(config.get_timing_cache().serialize())))
    return bytes(memoryview(plan))


def _configure(trt: Any, builder: Any, network: Any, config: Any, settings: dict[str, Any]) -> None:
    if settings["workspace_bytes"]:
        if hasattr(config, "set_memory_pool_limit"):
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings["workspace_bytes"])
        else:  # 8.2
            config.max_workspace_size = settings["workspace_bytes"]
    if hasattr(config, "builder_optimization_level"):  # from 8.6 on
        config.builder_optimization_level = settings["optimization_level"]
    if settings["compute_capability"]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, "SM" + settings["compute_capability"]), 0)
    if settings["dla_core"] >= 0:
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = settings["dla_core"]
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    image = network.get_input(0)
    batch, rest = image.shape[0], tuple(image.shape)[1:]
    if batch == -1 and -1 not in rest:  # other open sizes have no profile: the builder says so
        profile = builder.create_optimization_profile()
        profile.set_shape(image.name, (1, *rest), (1, *rest), (settings["max_batch"], *rest))
        config.add_optimization_profile(profile)


def _timing_cache(config: Any, file: str, settings: dict[str, Any]) -> bool:
    """Reuse what earlier builds timed. Nothing is timed where the chip is not here."""
    if settings["compute_capability"]:
        return False
    kept = b""
    if os.path.exists(file):
        with open(file, "rb") as stream:
            kept = stream.read()
    # One of another version or chip is not taken over; then an empty one is filled.
    return any(config.set_timing_cache(config.create_timing_cache(content), False) for content in (kept, b""))


def _write_layers(trt: Any, logger: Any, folder: str, plan: bytes) -> None:
    """What the engine is made of, as the engine itself says; where it cannot be opened, the log says so too."""
    with contextlib.suppress(OSError):
        os.remove(os.path.join(folder, LAYERS))
    engine = trt.Runtime(logger).deserialize_cuda_engine(plan) if hasattr(trt, "Runtime") else None
    if engine is not None and hasattr(engine, "create_engine_inspector"):
        text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
        write(os.path.join(folder, LAYERS), text.encode())


def _bits(kind: Any, names: tuple[str, ...]) -> int:
    """The flags that this version has, as the bit mask that it wants."""
    return sum(1 << int(getattr(kind, name)) for name in names if hasattr(kind, name))


def _complaint(error: Any) -> str:
    """A parser's error: the node, if it names one, and the first line of what is wrong with it."""
    name, operator = (
        getattr(error, field)() if hasattr(error, field) else "" for field in ("node_name", "node_operator")
    )
    node = name or (f"node {error.node()}" if error.node() >= 0 else "")
    where = "{}{}: ".format(node, f" ({operator})" if operator else "") if node else ""
    return where + " ".join(error.desc().split())


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        """Prints all there is, a severity in front of each entry; keeps the errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors = []  # type: list[str]

        def log(self, severity: Any, message: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.errors.append(" ".join(message.split()))
            print(f"{severity.name}|{message}", flush=severity.name != "VERBOSE")

    return Logger()


def write(path: str, content: bytes) -> None:
    """Whole or not at all: a board that runs out of disk leaves no half engine."""
    try:
        with open(path + ".part", "wb") as file:
            file.write(content)
        os.replace(path + ".part", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")
        path = os.path.abspath(path)
        free = shutil.disk_usage(os.path.dirname(path)).free
        room = f"{error.strerror}: {free / 1e6:.1f} MB free, {len(content) / 1e6:.1f} MB needed"
        raise OSError(error.errno, room, path) from None

"""A board without the board: stand-ins for libcudart, TensorRT's Python module and trtexec, in one folder.

The engines that they build are ONNX models that ONNX Runtime runs, so that logits, layer tables and sizes are real.
Faults are asked for in the file `fault` beside them: a word, see `Builder` and TRTEXEC.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
from tiny_model import tiny_onnx

from edgekd.artifact import Artifact, sha256_of
from edgekd.backends.tensorrt import TensorRT
from edgekd.quantize import ptq
from edgekd.stages import ENGINE

# Memory is this machine's own, a stream does at once what it is given, and time is counted in calls.
CUDART = """
#include <stdlib.h>
#include <string.h>
typedef size_t n; typedef void *p;
static int now, captured;
int cudaSetDevice(int d) { return d; }
const char *cudaGetErrorString(int e) { return e == 2 ? "out of memory" : "unknown"; }
int cudaGetDeviceProperties(char *c, int d) { strcpy(c, "Stand-in"); return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 7 : a == 16 ? 8 : -1; return 0; }
int cudaMalloc(p *m, n size) { *m = size > 1 << 30 ? 0 : malloc(size); return *m ? 0 : 2; }
int cudaStreamCreate(p *s) { *s = malloc(1); return 0; }
int cudaMemcpyAsync(p to, p from, n size, int kind, p s) { now++; memcpy(to, from, size); return 0; }
int cudaStreamSynchronize(p s) { return 0; }
int cudaEventCreate(p *e) { *e = calloc(1, sizeof(int)); return 0; }
int cudaEventRecord(int *e, p s) { *e = now; return 0; }
int cudaEventElapsedTime(float *ms, int *a, int *b) { *ms = *b - *a; return 0; }
int cudaStreamBeginCapture(p s, int mode) { return mode != 1; }
int cudaStreamEndCapture(p s, p *g) { *g = malloc(1); return 0; }
int cudaGraphInstantiateWithFlags(p *e, p g, unsigned long long f) { *e = g; return 0; }
int cudaGraphLaunch(p g, p s) { captured++; return 0; }
int launches(void) { return captured; }
"""
# The flags that tell releases apart.
RELEASES = {
    "8.6.2": {"BuilderFlag": ("FP16", "INT8", "GPU_FALLBACK"), "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH",)},
    "10.3.0": {
        "BuilderFlag": ("FP16", "INT8", "GPU_FALLBACK"),
        "NetworkDefinitionCreationFlag": ("EXPLICIT_BATCH", "STRONGLY_TYPED"),
    },
    "11.4.1": {
        "BuilderFlag": ("GPU_FALLBACK",),
        "NetworkDefinitionCreationFlag": ("STRONGLY_TYPED",),
        "OnnxParserFlag": ("ADJUST_FOR_DLA",),
    },
}
# A module with the interface of TensorRT 8.5 and later; a release's version and flags come before it.
TENSORRT = """
import ctypes, enum, json, os, pathlib, signal, time
import numpy as np
import os
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import onnx, onnxruntime
HERE = pathlib.Path(__file__).parent
def fault(): return (HERE / "fault").read_text() if (HERE / "fault").exists() else ""
def flags(name, *words): return enum.IntEnum(name, {word: at for at, word in enumerate(words)})
globals().update({name: flags(name, *words) for name, words in RELEASE.items()})
ProfilingVerbosity = flags("ProfilingVerbosity", "DETAILED")
TensorIOMode = flags("TensorIOMode", "INPUT", "OUTPUT")
LayerInformationFormat = flags("LayerInformationFormat", "JSON")
MemoryPoolType = flags("MemoryPoolType", "WORKSPACE")
DeviceType = flags("DeviceType", "GPU", "DLA")
class ILogger: pass
class Logger:
    WARNING = 0
    def __init__(self, severity): pass
class Thing:
    def __init__(self, *arguments): self.calls = []
    def __getattr__(self, name):
        if name in ("set_memory_pool_limit", "set_flag", "add_optimization_profile", "set_shape"):
            return lambda *arguments: self.calls.append((name, *arguments))
        raise AttributeError(name)
class Builder(Thing):
    def __init__(self, logger):
        if fault() == "no gpu": raise TypeError("factory function returned nullptr")
        self.logger = logger
    def create_network(self, bits):
        network = Thing()
        network.bits = bits
        return network
    def create_builder_config(self):
        config = Thing()
        config.create_timing_cache = lambda content: content
        config.set_timing_cache = lambda cache, ignore: setattr(config, "cache", cache) is None
        config.get_timing_cache = lambda: type("Cache", (), {"serialize": lambda self: b"timed" + config.cache})()
        return config
    def create_optimization_profile(self): return Thing()
    def build_serialized_network(self, network, config):
        Severity = type("Severity", (), {"name": "ERROR"})
        if fault() == "memory":
            self.logger.log(Severity, "Cuda Runtime (out of memory)")
            return None
        if fault() == "killed": os.kill(os.getpid(), signal.SIGKILL)
        if fault() == "slow":
            with open(HERE / "building", "a") as file: file.write("x")
            while fault() == "slow": time.sleep(0.02)
        asked = [flag.name for flag in NetworkDefinitionCreationFlag if network.bits & 1 << flag]
        if fault() == "untyped" and "STRONGLY_TYPED" in asked: return None
        flags = [BuilderFlag(call[1]).name for call in config.calls if call[0] == "set_flag"]
        head = {"network": asked, "flags": flags, "parsing": network.parsing, "calls": config.calls[:2]}
        head["dla"] = getattr(config, "DLA_core", -1)
        padding = bytes(20 << 20) if fault() == "large" else b""
        return json.dumps(head, default=str).encode() + b"\\n" + network.model + padding
class OnnxParser(Thing):
    def __init__(self, network, logger):
        super().__init__()
        self.network = network
    def parse_from_file(self, path):
        with open(path, "rb") as file: self.network.model = file.read()
        self.network.parsing = [call[1].name for call in self.calls]
        image = onnxruntime.InferenceSession(self.network.model).get_inputs()[0]
        shape = tuple(size if isinstance(size, int) else -1 for size in image.shape)
        self.network.get_input = lambda at: type("Input", (), {"name": image.name, "shape": shape})
        return True
class Runtime(Thing):
    def deserialize_cuda_engine(self, plan): return Engine(plan) if plan.startswith(b"{") else None
class Engine(Thing):
    num_io_tensors = 2
    def __init__(self, plan):
        self.head, _, self.model = plan.partition(b"\\n")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(self.model, options)
        self.ends = [*self.session.get_inputs(), *self.session.get_outputs()]
    def get_tensor_name(self, at): return self.ends[at].name
    def get_tensor_mode(self, name): return TensorIOMode.INPUT if name == self.ends[0].name else TensorIOMode.OUTPUT
    def get_tensor_shape(self, name):
        shape = next(end.shape for end in self.ends if end.name == name)
        return tuple(size if isinstance(size, int) else -1 for size in shape)
    def create_execution_context(self): return Context(self)
    def create_engine_inspector(self):
        table = json.dumps({"Layers": list(self.layers()), "Bindings": []})
        return type("Inspector", (), {"get_engine_information": lambda self, form: table})()
    def layers(self):
        graph, dla = onnx.load_from_string(self.model).graph, json.loads(self.head)["dla"]
        made = {name: node.op_type for node in graph.node for name in node.output}
        layers = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
        for at, node in enumerate(layers):
            kind = "Int8" if made.get(node.input[1]) == "DequantizeLinear" else "Float"
            if fault() == "float" and at == 0: kind = "Float"
            on_dla = int(dla) >= 0 and at < len(layers) - 1
            if not on_dla or at == 0:
                yield {"Name": "{ForeignNode[...]}" if on_dla else node.name or "node_of_" + node.output[0],
                       "LayerType": "DLA" if on_dla else "CaskConvolution", "Inputs": [{"Format/Datatype": kind}],
                       "Outputs": [{"Format/Datatype": kind}], "Weights": {"Type": kind, "Count": 1}, "TacticName": "t"}
class Context(Thing):
    def __init__(self, engine): self.engine, self.at, self.shape = engine, {}, None
    def set_tensor_address(self, name, address): self.at[name] = address
    def set_input_shape(self, name, shape): self.shape = shape; return True
    def execute_async_v3(self, stream):
        def view(name, shape):
            floats = (ctypes.c_float * int(np.prod(shape))).from_address(self.at[name])
            return np.ctypeslib.as_array(floats).reshape(shape)
        image, logits = self.engine.ends
        (found,) = self.engine.session.run(None, {image.name: view(image.name, self.shape)})
        view(logits.name, found.shape)[:] = found
        return True
"""
TRTEXEC = """#!{python}
import os, shutil, sys
given = dict(word.partition("=")[::2] for word in sys.argv[1:])
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec", *sys.argv[1:])
open(os.path.join({folder!r}, "calls"), "a").write(" ".join(sys.argv[1:]) + "\\n")
failing = os.path.exists(os.path.join({folder!r}, "fault"))
if failing and "--onnx" in given:
    print("[11/21/2026-10:00:01] [E] Error[2]: out of memory")
    print("&&&& FAILED TensorRT.trtexec")
    sys.exit(1)
if "--onnx" in given:
    shutil.copy(given["--onnx"], given["--saveEngine"])
    open(given["--exportLayerInfo"], "w").write('{{"Layers": ["conv"], "Bindings": []}}')
if "--loadEngine" in given:
    print("[11/21/2026-10:00:01] [I] Throughput: 1234.5 qps")
    print("[11/21/2026-10:00:01] [I] Latency: min = 0.75 ms, max = 2 ms, mean = 0.8 ms, median = 0.8 ms")
print("&&&& PASSED TensorRT.trtexec")
"""


def missing() -> str:
    """Why there can be none here; empty when there can."""
    return "" if _compiler() else "no C compiler for the stand-in of libcudart"


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc")


class Board:
    """The folder with the stand-ins, and `python`, the interpreter of a board that has them."""

    def __init__(self, folder: Path, *, module: bool = True, release: str = "10.3.0") -> None:
        folder.mkdir(parents=True)
        self.folder, self.library, self.python = folder, folder / "libcudart.so", folder / "venv/bin/python3"
        (folder / "cudart.c").write_text(CUDART)
        options = ["-shared", "-fPIC", "-w", "-Wl,-soname,libcudart.so"]
        argv = [_compiler(), *options, "-o", self.library, folder / "cudart.c"]
        subprocess.run([str(word) for word in argv], check=True)
        if module:
            about = f"__version__ = {release!r}\nRELEASE = {RELEASES[release]!r}\n"
            (folder / "tensorrt.py").write_text(about.replace("'", '"') + TENSORRT)
        else:
            (folder / "trtexec").write_text(TRTEXEC.format(python=sys.executable, folder=str(folder)))
            (folder / "trtexec").chmod(0o755)
        self._make_python()

    def _make_python(self) -> None:
        """With our own packages, the stand-ins, and their libcudart before that of this machine."""
        venv.create(self.folder / "venv", symlinks=True)
        (packages,) = (self.folder / "venv").glob("lib/*/site-packages")
        own = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "board.pth").write_text("\n".join([*own, str(self.folder), "import stand_ins"]))
        (self.folder / "stand_ins.py").write_text(
            f"import ctypes, os\nctypes.CDLL({str(self.library)!r})\n"
            f"os.environ['PATH'] = {str(self.folder)!r} + os.pathsep + os.environ['PATH']\n"
        )

    def fails_by(self, fault: str) -> None:
        """Let what it does next go wrong; nothing does by ""."""
        if fault:
            (self.folder / "fault").write_text(fault)
        else:
            (self.folder / "fault").unlink(missing_ok=True)

    @property
    def builds(self) -> int:
        """How many slow builds were begun."""
        file = self.folder / "building"
        return len(file.read_text()) if file.exists() else 0


def bundle(folder: Path, *, int8: bool = False, **options: Any) -> Artifact:
    """What the stage that compiles leaves of a tiny network: everything for the board but the engine."""
    (folder / ENGINE).mkdir(parents=True)
    model = tiny_onnx(folder / "tiny.onnx")
    if int8:
        images = np.random.default_rng(0).standard_normal((8, 3, 6, 6)).astype(np.float32)
        model = folder / "int8.onnx"
        ptq.quantize(folder / "tiny.onnx", model, images)
    TensorRT(**{"max_batch": 4, **options}).compile(model, folder / ENGINE, threads=1)
    return Artifact(folder, {"stage": "engine-student", "digest": sha256_of(folder / ENGINE / "model.onnx")})

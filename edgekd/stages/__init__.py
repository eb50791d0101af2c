"""What each stage makes. A stage is a function of the job, its input artifacts and two folders: the artifact to fill,
and scratch that survives a kill. It returns the result that goes into the manifest.

torch is imported inside the stages that train or export: planning and reporting work without it.
"""

from edgekd.compiling import ENGINE
from edgekd.stages.attacking import attack
from edgekd.stages.boards import boards
from edgekd.stages.corrupting import corrupt
from edgekd.stages.deploying import bench, build, engine
from edgekd.stages.exporting import onnx, quantize
from edgekd.stages.job import CURVES, LABELS, LOGITS, MODEL, WEIGHTS, Inputs, Job
from edgekd.stages.packing import ARCHIVE, code_sha256, pack
from edgekd.stages.spreading import parts
from edgekd.stages.training import finetune, finetuning, scratch, student, teacher

__all__ = [
    "ARCHIVE", "CURVES", "ENGINE", "LABELS", "LOGITS", "MODEL", "WEIGHTS", "Inputs", "Job", "attack", "bench",
    "boards", "build", "code_sha256", "corrupt", "engine", "finetune", "finetuning", "onnx", "pack", "parts",
    "quantize", "scratch", "student", "teacher",
]  # fmt: skip

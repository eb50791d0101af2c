"""What would fail late in a run, found before anything is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from edgekd import registry, stages
from edgekd.bench import loadgen
from edgekd.data import corruptions
from edgekd.device import Device
from edgekd.errors import MissingError, RecipeError
from edgekd.quantize.quantizers import TrainingQuantizer
from edgekd.recipe import Train
from edgekd.stages import Job

if TYPE_CHECKING:
    from torch import nn

    from edgekd.methods import Method


def check_device(job: Job) -> Device:
    """The device. Raises for one that cannot be measured on, as far as its URL and the target tell."""
    if not job.has_device:
        raise MissingError(
            f"target {job.target.name} is a board, and no device is named",
            allowed="everything up to edgekd compile works without one",
            fix="--device ssh://USER@HOST",
        )
    return job.open_device()


def check(job: Job, to_make: Collection[str]) -> None:
    """Find what would fail late in the stages `to_make` before anything is trained: method, networks, backend."""
    _check_budget(job)
    if not job.has_images:
        _check_without_images(job, to_make)
    if job.recipe.corruptions is not None:
        for kind in job.recipe.corruptions.kinds:
            registry.entry("corruption", kind, "corruptions.kinds")
        corruptions.check(job.dataset.test.images)
    if "attack" in to_make and job.task.name != "classification":
        raise RecipeError(
            f"attack asks for accuracy under attack, and the task of {job.dataset.name} is {job.task.name}",
            allowed="expected: classes, which an attack can have confused",
            fix="set attack = null",
            key="attack",
        )
    if any(stage.startswith("onnx-") for stage in to_make):
        registry.create("backend", "onnxruntime").require()  # the judge of what an ONNX file computes
    if any(stage == "bench" or stage.startswith("build-") for stage in to_make):
        _check_reach(job)
    if {"bench", "kit", "boards"} & set(to_make):
        _check_mode(job)
    if "boards" in to_make:
        _check_boards(job)
    if any(stage.startswith("engine-") for stage in to_make):
        _check_precision(job)
        job.backend.require()
    if {"bench", "kit"} & set(to_make):
        job.backend.libraries()
    if "quantize" in to_make:
        job.quantizer().require()
        if job.recipe.quantize.calibration is not None:
            _ = job.calibration  # raises for a set that does not fit the data
    if "student" in to_make:
        job.method()
    built = {subject: job.build(subject) for subject in job.subjects if {subject, "student", "finetune"} & set(to_make)}
    # Taps that do not exist shall not wait for the teacher's last epoch, nor for the student's.
    if "student" in to_make:
        _check_method(job, built, job.recipe.distill.train)
    if "finetune" in to_make:
        quantizer = job.quantizer()
        assert isinstance(quantizer, TrainingQuantizer)
        method = _check_method(job, built, stages.finetuning(job, quantizer), finetuning=True)
        if (method.needs_modules or method.student_taps.paths) and not quantizer.keeps_modules:
            other = "kd" if "teacher" in job.subjects else "scratch"
            raise RecipeError(
                f"quantize.method = {job.recipe.quantize.method} cannot train by distill.method ="
                f" {job.recipe.distill.method}, which looks into the student's modules",
                allowed="with rounding in place the student is a graph without modules; its logits are there",
                fix=f"set quantize.method = ptq, or distill.method = {other}",
                key="quantize.method",
            )


def _check_precision(job: Job) -> None:
    """What the backend cannot compute shall not wait for the training."""
    precision, method = job.quantizer().precision, job.recipe.quantize.method
    if precision not in job.backend.precisions:
        raise RecipeError(
            f"quantize.method = {method} makes {precision}, which backend {job.backend.name} does not compute",
            allowed=f"{job.backend.name} computes: {', '.join(job.backend.precisions)}",
            fix="--set quantize.method=ptq, or another backend: --backend onnxruntime",
            key="quantize.method",
        )


def _check_reach(job: Job) -> None:
    """A board that answers, or a machine that runs what is made for it."""
    if not (job.device or job.target.device).startswith("local:"):
        check_device(job).facts()
    elif job.backend.builds_on == "host" and not job.backend.runs_here:
        raise MissingError(
            f"what backend {job.backend.name} makes for target {job.target.name} does not run on this machine",
            allowed="its options name another processor, or a GPU that is not here",
            fix="--device ssh://USER@HOST, or another --target or --backend",
        )


def _check_boards(job: Job) -> None:
    """A board for each part, and parts that can be made for them."""
    parts = job.recipe.student.options["boards"]
    if len(job.boards) != parts:
        raise RecipeError(
            f"student.boards = {parts}, and {len(job.boards)} devices are named",
            allowed="expected: a device for each part; local: may be given again and again",
            fix=f"name {parts} devices, or one to measure the whole student there",
            key="student.boards",
        )
    recipe = job.recipe
    for key, value, off in (
        ("quantize.method", recipe.quantize.method, "none"),
        ("benchmark.loadgen", recipe.benchmark.loadgen, False),
        ("benchmark.end_to_end", recipe.benchmark.end_to_end, False),
    ):
        if value != off:
            raise RecipeError(
                f"{key} = {str(value).lower()} is for a whole student, not for the parts of several boards",
                allowed="parts are compiled in floating point, and timed by themselves",
                fix=f"--set {key}={str(off).lower()}",
                key=key,
            )
    for name, board in job.boards.items():
        if board.backend.builds_on == "device":
            raise RecipeError(
                f"{name}: backend {board.backend.name} builds on the board, and parts are compiled here",
                allowed="expected: a target whose engines are made here",
                fix="--backend onnxruntime",
            )
        board.backend.require()
        board.backend.libraries()


def _check_mode(job: Job) -> None:
    mode = job.mode()
    if mode.needs_batches and job.recipe.export.batch == "static":
        raise RecipeError(
            f"benchmark.mode = {mode.name} times batches, and export.batch = static makes engines for one sample",
            allowed="with one sample at a time: benchmark.mode = single_stream, multi_stream, fps or sustained",
            fix="set export.batch = dynamic",
            key="benchmark.mode",
        )
    if job.recipe.benchmark.loadgen:
        loadgen.require()
        url = job.device or job.target.device
        if mode.name != "single_stream" or not url.startswith("local:"):
            raise RecipeError(
                f"benchmark.loadgen cannot check benchmark.mode = {mode.name} on {url}",
                allowed="it times single inferences on this machine: mode single_stream, device local:",
                fix="leave out --loadgen",
                key="benchmark.loadgen",
            )


def _check_budget(job: Job) -> None:
    drop = job.recipe.budgets.accuracy_drop
    if drop is not None and drop > 1 and job.task.metric.share:
        raise RecipeError(
            f"budgets.accuracy_drop = {drop:g} is no share of the samples",
            allowed=f"expected: 0 to 1, the largest loss of {job.task.metric.label} against the teacher",
            fix=f"set budgets.accuracy_drop = {drop / 100:g} for {drop:g} points",
            key="budgets.accuracy_drop",
        )


def _check_without_images(job: Job, to_make: Collection[str]) -> None:
    """What asks for images where the recipe has none, and no test images either."""
    recipe, source = job.recipe, job.recipe.data.source
    if "teacher" in to_make and recipe.teacher is not None and recipe.teacher.checkpoint is None:
        raise RecipeError(
            f"the teacher cannot be trained: data.source = {source} has no images",
            allowed="expected: a teacher that was trained elsewhere",
            fix="--set teacher.checkpoint=FILE",
            key="teacher.network",
        )
    if "quantize" in to_make or "finetune" in to_make:
        raise RecipeError(
            f"quantize.method = {recipe.quantize.method} needs images, and data.source = {source} has none",
            allowed="expected: none, where there is nothing to measure ranges on",
            fix="--set quantize.method=none",
            key="quantize.method",
        )
    for stage, asked in (("attack", "attack"), ("corrupt", "corruptions")):
        if stage in to_make and not job.has_test:
            raise RecipeError(
                f"{asked} needs test images, and data.source = {source} names none",
                allowed="expected: data.test, {NAME: {option: value}}",
                fix=f"set {asked} = null, or name test images",
                key=asked,
            )


def _check_method(job: Job, built: Mapping[str, nn.Module], spec: Train, *, finetuning: bool = False) -> Method:
    from torch import nn

    from edgekd.methods import attachment

    method = job.method(finetuning=finetuning)
    attachment.attach(method, built["student"], built.get("teacher"), job.dataset, spec)
    count = len(job.dataset.train)
    size = min(spec.batch_size, count)
    attachment.check_batch_norm(nn.ModuleList([built["student"], method]), size)
    attachment.check_replays(method, count // size)
    return method

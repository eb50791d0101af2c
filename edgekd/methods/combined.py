"""Several methods at once, or one after the other.

    method: combined                                      method: staged
    methods: [kd, {rkd: {distance_weight: 10}}]           methods: [{fitnet: {ce_weight: 0}}, kd]
                                                          epochs: [10, 30]

Every method has weights of its own among its options, and these are the weights of the sum.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import registry
from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.registry import MethodChoice, register

# What methods call their loss on the labels: for classes, and for other tasks.
LABEL_TERMS = ("ce", "task")
# Progress is a quotient of batches: the first batch of a stage may fall short of it by rounding.
ROUNDING = 1e-9
# In an error of one of the methods: its options, and the advice to set one of them.
OWN_OPTION = re.compile(r"\bdistill\.(?!methods?\b|train\b)")
SET_OPTION = re.compile(r"--set ('?)(distill\.methods\.\w+\.[\w.]+)=(.+?)\1(?=, |$)")


class _Several(Method):
    """What the methods need together, each under its own name; a name that comes twice gets a number."""

    def __init__(self, methods: list[MethodChoice]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for chosen in methods:
            ((name, options),) = chosen.items()
            number = sum(other.partition("-")[0] == name for other in self.parts)
            self.parts[f"{name}-{number + 1}" if number else name] = _made(name, options)
        if not self.parts:
            raise RecipeError(
                "distill.methods is empty",
                allowed="expected: one method or more, NAME or {NAME: {option: value}}",
                fix="--set 'distill.methods=[kd]'",
                key="distill.methods",
            )
        known = [part.tasks for _, part in self.named_parts() if part.tasks is not None]
        self.tasks = tuple(task for task in known[0] if all(task in own for own in known)) if known else None
        if self.tasks == ():
            own = (f"{name} learns {' or '.join(part.tasks or ['any'])}" for name, part in self.named_parts())
            raise RecipeError(
                f"distill.methods have no task in common: {', '.join(own)}",
                allowed="expected: methods that can all learn what the data asks for",
                fix="leave out those that are for other tasks",
                key="distill.methods",
            )
        self.needs_teacher = any(part.needs_teacher for _, part in self.named_parts())
        self.needs_target = any(part.needs_target for _, part in self.named_parts())
        self.needs_modules = any(part.needs_modules for _, part in self.named_parts())
        self.needs_images = any(part.needs_images for _, part in self.named_parts())
        self.uses_all_parameters = all(part.uses_all_parameters for _, part in self.named_parts())
        self.replays = max(part.replays for _, part in self.named_parts())

    @property
    def ready(self) -> float:
        """When the last of them is."""
        return max(part.ready for _, part in self.named_parts())

    def replays_at(self, progress: float) -> int:
        """Of the one that replays."""
        return max(part.replays_at(progress) for _, part in self.named_parts())

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Attach each of them; all their taps are taps of this one."""
        for (name, part), epochs in zip(self.named_parts(), self.epochs_of(setting), strict=True):
            with _part(name):
                part.attach(student, teacher, replace(setting, epochs=epochs))
            self.student_taps = self.student_taps | part.student_taps
            self.teacher_taps = self.teacher_taps | part.teacher_taps

    def epochs_of(self, setting: Setting) -> list[int]:
        """How many each of them has."""
        return [setting.epochs] * len(self.parts)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of all of them."""
        return [optimizer for _, part in self.named_parts() for optimizer in part.optimizers()]

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        """Constrain the student by each of them, in order."""
        for _, part in self.named_parts():
            part.constrain(student, step_size=step_size, progress=progress)

    def scheduled(self, progress: float) -> dict[str, float]:
        """Those of all of them, each under its method's name."""
        return {
            f"{name}_{option}": value
            for name, part in self.named_parts()
            for option, value in part.scheduled(progress).items()
        }

    def named_parts(self) -> list[tuple[str, Method]]:
        """The methods by their names, in order."""
        return [(name, part) for name, part in self.parts.items() if isinstance(part, Method)]


def _made(name: str, options: dict[str, Any]) -> Method:
    with _part(name):
        made: Method = registry.create("method", name, options=options, where=f"distill.methods.{name}")
    return made


@contextlib.contextmanager
def _part(name: str) -> Iterator[None]:
    """An error of one of the methods names its options as they stand in the recipe, in a list, where --set cannot go.

    name: the method's; of a second one with its number.
    """
    try:
        yield
    except RecipeError as error:
        where = f"distill.methods.{name.partition('-')[0]}."
        what, allowed, fix, key = (
            OWN_OPTION.sub(where, text) for text in (error.what, error.allowed, error.fix, error.key)
        )
        fix = SET_OPTION.sub(r"write \2: \3 in the recipe", fix)
        raise RecipeError(what, allowed=allowed, fix=fix, key=key) from error


@register("method", "combined")
class Combined(_Several):
    """The terms of several methods are added; the loss on the labels is that of the first method that has one.

    methods: NAME or {NAME: {option: value}}. All but the first add what they distil, and not the labels again.
    """

    def __init__(self, *, methods: list[MethodChoice]) -> None:
        super().__init__(methods)
        replaying = {name: part.replays for name, part in self.named_parts() if part.replays > 1}
        if len(set(replaying.values())) > 1:
            said = ", ".join(f"{name} {number} times" for name, number in replaying.items())
            raise RecipeError(
                f"distill.methods take every batch more than once, and not as often as each other: {said}",
                allowed="expected: the same number of all that replay batches",
                fix="give them the same number, or train one after the other: distill.method = staged",
                key="distill.methods",
            )

    def finetuning(self) -> Method:
        """The same, of what each of them trains on by."""
        for name, part in self.named_parts():
            self.parts[name] = part.finetuning()
        return self

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce or task: scalar, NAME_TERM: scalar for every other term of every method}."""
        terms: dict[str, Tensor] = {}
        for name, part in self.named_parts():
            own = part(step)
            labels = {term: own.pop(term) for term in LABEL_TERMS if term in own}
            if not any(term in terms for term in LABEL_TERMS):
                terms |= labels
            terms |= {f"{name}_{term}": value for term, value in own.items()}
        return terms


@register("method", "staged")
class Staged(_Several):
    """Several methods one after the other, each for its number of epochs.

    methods: NAME or {NAME: {option: value}}. epochs: of each; together those of distill.train. A schedule runs over
    the epochs of its own method. The student, its optimiser and the learning rate go on from stage to stage.
    """

    def __init__(self, *, methods: list[MethodChoice], epochs: list[int]) -> None:
        super().__init__(methods)
        self.ends = [end / max(1, sum(epochs)) for end in accumulate(epochs)]
        self.epochs = epochs
        self.uses_all_parameters = False
        if len(epochs) != len(methods) or min(epochs, default=0) < 1:
            raise RecipeError(
                f"distill.epochs = {epochs} does not fit {len(methods)} methods",
                allowed="expected: a number of epochs, at least 1, for each method",
                fix=f"--set 'distill.epochs={[1] * len(methods)}', and so on",
                key="distill.epochs",
            )

    @property
    def ready(self) -> float:
        """When the last of them is that makes one wait, each in its own stage."""
        spans = zip([0.0, *self.ends], self.ends, self.named_parts(), strict=False)
        return max([start + part.ready * (end - start) for start, end, (_, part) in spans if part.ready] or [0.0])

    def replays_at(self, progress: float) -> int:
        """Of the method whose turn it is."""
        part, own = self._turn(progress)
        return part.replays_at(own)

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Attach all of them. Raises RecipeError when their epochs are not those of the training."""
        if sum(self.epochs) != setting.epochs:
            raise RecipeError(
                f"distill.epochs = {self.epochs} are {sum(self.epochs)} epochs, and distill.train has {setting.epochs}",
                allowed="expected: the same sum",
                fix=f"--set distill.train.epochs={sum(self.epochs)}",
                key="distill.epochs",
            )
        super().attach(student, teacher, setting)

    def epochs_of(self, setting: Setting) -> list[int]:
        """Those of its stage."""
        return self.epochs

    def finetuning(self) -> Method:
        """What the last of them trains on by: all before it are done."""
        _, last = self.named_parts()[-1]
        return last.finetuning()

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of the method whose turn it is."""
        part, own = self._turn(step.progress)
        terms: dict[str, Tensor] = part(step.at(own))
        return terms

    def scheduled(self, progress: float) -> dict[str, float]:
        """Those of the method whose turn it is."""
        part, own = self._turn(progress)
        return part.scheduled(own)

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        """Constrain the student by the method whose turn it is, and by those before it as they left it."""
        for number, (_, part) in enumerate(self.named_parts()):
            if number == 0 or progress > self.ends[number - 1] + ROUNDING:
                part.constrain(student, step_size=step_size, progress=self._own_progress(number, progress))

    def _turn(self, progress: float) -> tuple[Method, float]:
        """The method whose turn it is, and how far it is."""
        number = sum(progress + ROUNDING >= end for end in self.ends[:-1])
        _, part = self.named_parts()[number]
        return part, self._own_progress(number, progress)

    def _own_progress(self, number: int, progress: float) -> float:
        """How far the method of that number is, 0 to 1."""
        start, end = [0.0, *self.ends][number : number + 2]
        return min(max(0.0, (progress - start) / (end - start)), 1.0)

"""Distillation without data, by a generator of images on which student and teacher disagree.

Fang, Song, Wang, Shen, Wang, Song, "Data-Free Adversarial Distillation" (DFAD), arXiv 1912.11006, and its code. With a
generator G of images from noise z,

    the student minimises     mean | f_S(G(z)) - f_T(G(z)) |          over logits and batch
    the generator minimises   - mean | f_S(G(z)) - f_T(G(z)) |        for segmentation:  - log(1 + mean | . |)

The teacher is in evaluation mode, and gradients flow through it and through the student to G. Every step of the
generator is followed by `student_steps` of the student. No image of a data set takes part, and no label.

As in the code: noise of 256 numbers, five student steps, the generator's own Adam from 1e-3. Its learning rate falls by
a cosine, as the student's does unless the recipe says otherwise: at a constant one the generator wins in the end, and
the student forgets what it had learned (docs/results.md). There both networks move in turn, each on images of its own;
here the generator's step is taken on the images of the last of the student's steps, before either has moved. Published
budgets are long: 500 epochs of 50 generator steps for CIFAR.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.methods import Method, Setting, Step
from edgekd.methods.discriminator import judged
from edgekd.methods.generators import generator
from edgekd.methods.options import above_zero, at_least_zero
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "dfad")
class DFAD(Method):
    """A generator makes the images on which the student differs most from the teacher; no data set is needed.

    weight: of the difference. latent: numbers of noise per image. student_steps: of the student for each of the
    generator. generator_lr: learning rate of the generator's Adam.
    """

    tasks = ("classification", "segmentation")
    needs_images = False
    uses_all_parameters = False  # the generator moves at the end of every turn

    def __init__(
        self,
        *,
        weight: float | Schedule = 1.0,
        latent: int = 256,
        student_steps: int = 5,
        generator_lr: float | Schedule = {"cosine": [1e-3, 1e-5]},  # noqa: B006 - read, never changed
    ) -> None:
        super().__init__()
        self.weight, self.latent, self.replays, self.generator_lr = weight, latent, student_steps, generator_lr
        at_least_zero("weight", weight, 1)
        above_zero("latent", latent, 256)
        above_zero("student_steps", student_steps, 5)
        above_zero("generator_lr", generator_lr, 1e-3)
        self._optimizer: torch.optim.Optimizer | None = None

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Make the generator. Raises RecipeError for image sizes that it cannot make."""
        self.generator = generator(self.latent, setting.example.shape[1:])

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The generator's own."""
        self._optimizer = torch.optim.Adam(self.generator.parameters(), lr=value_at(self.generator_lr, 0.0))
        return [self._optimizer]

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{discrepancy: scalar; generator: scalar, for it alone, in the last step of a turn}."""
        turns = step.replay == self.replays - 1
        with torch.set_grad_enabled(turns):
            images = self.generator(torch.randn(len(step.x), self.latent, device=step.x.device))
        answers = step.ask_teacher(images)
        student = step.student(images.detach()).float()
        step.record("agreement", (student.argmax(1) == answers.argmax(1)).float().mean())
        terms = {"discrepancy": value_at(self.weight, step.progress) * difference(student, answers.detach())}
        if self._optimizer is not None:
            self._optimizer.param_groups[0]["lr"] = value_at(self.generator_lr, step.progress)
        if turns:
            assert isinstance(step.student, nn.Module)
            away = difference(judged(step.student, images).float(), answers)
            terms["generator"] = -(away.log1p() if student.ndim > 2 else away)
        return terms


def difference(logits: Tensor, other: Tensor) -> Tensor:
    """The mean distance of two answers [B, K, ...]: a scalar."""
    return (logits - other).abs().mean()

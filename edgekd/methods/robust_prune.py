"""Pruning, distillation and adversarial training as one problem, solved by proximal gradient steps.

Lee, Lee, "Robust compression of deep neural networks by pruning, distillation and adversarial training with a proximal
gradient method", Applied Sciences 11(3):1093, 2021, of which the abstract is known here, with that of the authors'
sparse coding by proximal steps and debiasing (arXiv 1905.07931). A reconstruction [R] that fits both:

    min over W of  E max over |d| <= epsilon of [ (1 - a) CE(f(x + d), y) + a tau^2 KL(p_T(x; tau) || p_W(x + d; tau)) ]
                   + penalty Omega(W)

    V = W - eta g;      l1:      W = sign(V) max(|V| - eta penalty, 0)
                        groups:  W_g = V_g max(1 - eta penalty sqrt(n_g) / ||V_g||, 0)

with g the optimiser's step, momentum and all. Then debiasing: what is 0 stays 0, and the rest is trained on without the
penalty. The attack is PGD on the student's cross-entropy, in evaluation mode; the teacher sees the clean image [R], as
in ARD. Our own: a group is a channel with all weights that belong to it or read it, where the abstract says filters; a
weight that lies in two groups is shrunk by both; and at the start of debiasing the weakest groups follow, by their root
mean square, until the sparsity that was asked for is reached. The paper's hyper-parameters are not known here; those of
the attack are its rival's (Ye et al., ICCV 2019).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from edgekd.errors import RecipeError
from edgekd.methods import Method, Setting, Step
from edgekd.methods.attacks import Ball, evaluating, pgd
from edgekd.methods.divergence import divergence
from edgekd.methods.kd import KD
from edgekd.methods.options import a_share, above_zero, at_least_zero, from_zero_to_one
from edgekd.methods.pruning import ChannelGroups, Prunable, SingleWeights
from edgekd.registry import register
from edgekd.schedule import Schedule, value_at


@register("method", "robust_prune")
class RobustPrune(Method):
    """The student learns under attack from the teacher while channels are pruned; they are gone in what is exported.

    prune: `channels`, which makes the network smaller and faster, or single `weights`, which only makes them 0.
    sparsity: the share of them that is 0 in the end; null is what the penalty alone has made 0 until then.
    penalty: of group norms or absolute values. debias: from which share of the training on nothing more is pruned.
    kd_weight: a, the share of KL in the loss. temperature: tau.
    epsilon, step_size: of the attack, in units of 1/255 of the pixel scale. steps: of its gradient; 0 is no attack.
    """

    def __init__(
        self,
        *,
        prune: Literal["channels", "weights"] = "channels",
        sparsity: float | None = 0.5,
        penalty: float | Schedule = 5e-4,
        debias: float = 0.6,
        kd_weight: float | Schedule = 0.7,
        temperature: float | Schedule = 4.0,
        epsilon: float | Schedule = 8.0,
        step_size: float | Schedule = 2.0,
        steps: int = 10,
    ) -> None:
        super().__init__()
        self.prune, self.sparsity, self.penalty, self.debias = prune, sparsity, penalty, debias
        self.kd_weight, self.temperature = kd_weight, temperature
        self.epsilon, self.step_size, self.steps = epsilon, step_size, steps
        above_zero("temperature", temperature, 4)
        above_zero("step_size", step_size, 2)
        at_least_zero("penalty", penalty, 5e-4)
        at_least_zero("epsilon", epsilon, 8)
        at_least_zero("steps", steps, 10)
        from_zero_to_one("kd_weight", kd_weight, 0.7)
        a_share("sparsity", 0 if sparsity is None else sparsity, 0.5)
        a_share("debias", debias, 0.5)
        self.mean: Tensor
        self.std: Tensor
        self.decided: Tensor

    @property
    def ready(self) -> float:
        """When debiasing begins."""
        return self.debias

    def attach(self, student: nn.Module, teacher: nn.Module | None, setting: Setting) -> None:
        """Find what is pruned together; and remember what images are. Raises RecipeError for a student without any."""
        self.register_buffer("mean", setting.mean, persistent=False)
        self.register_buffer("std", setting.std, persistent=False)
        self.register_buffer("decided", setting.example.new_zeros(()))
        if self.prune == "weights":
            self._pruned: Prunable = SingleWeights(student)
        else:
            self._pruned = ChannelGroups(student, setting.example)
        if not self._pruned.count:
            raise RecipeError(
                "the student has no channels that could be removed",
                allowed="a channel goes when no layer but convolutions, linear layers and batch normalisation read it",
                fix="set distill.prune = weights, or use another student",
                key="distill.prune",
            )
        self.register_buffer("kept", setting.example.new_ones(self._pruned.count))
        self.kept: Tensor

    def finetuning(self) -> Method:
        """Plain distillation: the student has been pruned."""
        return KD(kd_weight=self.kd_weight, temperature=self.temperature)

    def forward(self, step: Step) -> dict[str, Tensor]:
        """{ce: scalar, kd: scalar}, both of attacked images."""
        epsilon, step_size, tau, kd_weight = (
            value_at(option, step.progress)
            for option in (self.epsilon, self.step_size, self.temperature, self.kd_weight)
        )
        logits = step.student_logits
        if self.steps:
            ball = Ball.of(epsilon, step_size, self.mean, self.std)
            with evaluating(step.student):
                attacked = pgd(lambda x: F.cross_entropy(step.student(x).float(), step.y), step.x, ball, self.steps)
            logits = step.student(attacked).float()
            step.record("accuracy_attacked", (logits.argmax(1) == step.y).float().mean())
        step.record("pruned", 1 - self.kept.mean())
        return {
            "ce": (1 - kd_weight) * F.cross_entropy(logits, step.y),
            "kd": kd_weight * tau**2 * divergence(step.teacher_logits, logits, tau),
        }

    def constrain(self, student: nn.Module, *, step_size: float, progress: float) -> None:
        """A proximal step; from debiasing on, what has been pruned stays 0."""
        if not self.decided:
            if progress < self.debias:
                self._pruned.shrink(student, step_size * value_at(self.penalty, progress))
                return
            strength = self._pruned.strength(student)
            kept = self._pruned.strongest(strength, self.sparsity or 0.0)
            self.kept.copy_(kept * (strength > 0))
            self.decided.fill_(1)
        self._pruned.scale(student, self.kept)

"""Distillation of a dense teacher into a factored student: DistilBERT's three losses (arXiv:1910.01108, section 3).

L = alpha_ce T^2 KL(softmax(t / T) || softmax(s / T)) + alpha_task CE(s, labels) + alpha_cos (1 - cos(h_s, h_t))

A factored student has its teacher's hidden size, so the cosine needs no projection.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from examples.dialogue.settings import DistillationSettings
from svdconvert.errors import InputError


@dataclass(frozen=True)
class Terms:
    """The losses before their weights, each summed over the tokens that count.

    Attributes:
        ce: T^2 KL of the softened predictions, nats.
        task: cross-entropy with the labels, nats.
        cos: 1 - cosine of the last hidden states.
        tokens: how many tokens count.
    """

    ce: Tensor
    task: Tensor
    cos: Tensor
    tokens: Tensor


def distillation_terms(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_hidden: Tensor,
    teacher_hidden: Tensor,
    labels: Tensor,
    temperature: float,
) -> Terms:
    """The three losses on the tokens with a label.

    Args:
        student_logits, teacher_logits: [B, T, V].
        student_hidden, teacher_hidden: [B, T, D], last hidden states.
        labels: [B, T], -100 where nothing is to be learned; the prediction at t is for the label at t + 1.
        temperature: T.

    Returns:
        Sums in float32.
    """
    counted = labels[:, 1:] != -100
    student, teacher = student_logits[:, :-1][counted].float(), teacher_logits[:, :-1][counted].float()
    targets = labels[:, 1:][counted]
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    alike = F.cosine_similarity(student_hidden[:, :-1][counted].float(), teacher_hidden[:, :-1][counted].float(), -1)
    return Terms(
        ce=soft * temperature**2,
        task=F.cross_entropy(student, targets, reduction="sum"),
        cos=(1 - alike).sum(),
        tokens=counted.sum(),
    )


class DistillationTrainer(Trainer):
    """The stock Trainer with the three losses in training, and the labels' cross-entropy alone in evaluation."""

    def __init__(self, *args: Any, teacher: Any, distillation: DistillationSettings, **kwargs: Any) -> None:
        """As Trainer, with a teacher.

        Raises:
            InputError: teacher and student have different vocabularies or hidden sizes.
        """
        super().__init__(*args, **kwargs)
        student: Any = self.model
        own, other = student.config, teacher.config
        if (own.vocab_size, own.hidden_size) != (other.vocab_size, other.hidden_size):
            raise InputError(
                f"the teacher has {other.vocab_size} tokens and hidden size {other.hidden_size}, the student "
                f"{own.vocab_size} and {own.hidden_size}; distillation compares them one by one"
            )
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)
        self.distillation = distillation
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The weighted sum of the terms, averaged over the tokens of the whole batch."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        plain = {key: value for key, value in inputs.items() if key != "labels"}
        output = model(**plain, output_hidden_states=True, use_cache=False)
        with torch.no_grad():
            target = self.teacher(**plain, output_hidden_states=True, use_cache=False)
        terms = distillation_terms(
            output.logits,
            target.logits,
            output.hidden_states[-1],
            target.hidden_states[-1],
            labels,
            self.distillation.temperature,
        )
        for name in ("ce", "task", "cos", "tokens"):
            self._sums[name] += getattr(terms, name).detach()
        d = self.distillation
        total = d.alpha_ce * terms.ce + d.alpha_task * terms.task + d.alpha_cos * terms.cos
        # Trainer hands over the tokens of all devices' accumulated batches, and averages gradients over devices
        loss = (
            total * self.accelerator.num_processes / num_items_in_batch if num_items_in_batch else total / terms.tokens
        )
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the terms apart, before their weights, as means over the tokens since the last time."""
        if "loss" in logs and self._sums:
            tokens = self._sums.pop("tokens")
            logs |= {f"loss_{name}": round(float(value / tokens), 6) for name, value in self._sums.items()}
            self._sums.clear()
        super().log(logs, *args, **kwargs)

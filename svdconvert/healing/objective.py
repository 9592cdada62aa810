"""KL(dense || compressed) of the predictions on some sequences, and its gradient with respect to the factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.healing.precision import computing
from svdconvert.healing.student import Student
from svdconvert.healing.teacher import Teacher
from svdconvert.models.head_divergence import HeadDivergence, head_divergence
from svdconvert.models.loss import predicted_tokens


class Diverged(Exception):
    """The compressed model gives no finite numbers any more."""


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        student: the compressed model.
        teacher_head: the dense model's head; None where it is the compressed model's own.
        tokens: the text.
        batch_size: sequences at a time.
        precision: of the matrix products of both heads.
    """

    student: Student
    teacher_head: nn.Module | None
    tokens: CalibrationTokens
    batch_size: int
    precision: torch.dtype

    def measure(self, teacher: Teacher, sequences: Tensor, precision: torch.dtype | None = None) -> HeadDivergence:
        """Sums over the predicted tokens of some sequences.

        Args:
            teacher: has the dense model's states of them.
            sequences: their numbers.
            precision: of the matrix products, where it is another one.

        Raises:
            Diverged: a model gives no finite numbers.
        """
        sums = HeadDivergence()
        with torch.no_grad(), self.student.computing_in(precision or self.precision):
            for part in sequences.split(self.batch_size):
                hidden = self.student.hidden(self.tokens.ids[part], self.tokens.mask[part])
                found, _ = self._compare(teacher, part, hidden, precision or self.precision, gradient=False)
                sums += found
        return sums

    def differentiate(self, teacher: Teacher, sequences: Tensor) -> float:
        """Add the gradient of the mean over the predicted tokens of some sequences to the factors'.

        Returns:
            The mean, nats.

        Raises:
            Diverged: as :meth:`measure`.
        """
        parts: Sequence[Tensor] = sequences.split(self.batch_size)
        count = sum(self._predicted(part) for part in parts)
        total = 0.0
        for part in parts:
            with torch.enable_grad():
                hidden = self.student.hidden(self.tokens.ids[part], self.tokens.mask[part])
            found, slope = self._compare(teacher, part, hidden.detach(), self.precision, gradient=True)
            torch.autograd.backward(hidden, slope / count)
            total += found.kl
        return total / count

    def _predicted(self, part: Tensor) -> int:
        return predicted_tokens(self.tokens.ids[part], self.tokens.mask[part])[0].numel()

    def _compare(
        self, teacher: Teacher, part: Tensor, hidden: Tensor, precision: torch.dtype, *, gradient: bool
    ) -> tuple[HeadDivergence, Tensor]:
        with computing(self.student.device, precision):
            return head_divergence(
                self.student.head,
                teacher.states(part),
                hidden,
                self.tokens.ids[part],
                self.tokens.mask[part],
                vocabulary=self.student.vocabulary,
                check=_check,
                gradient=gradient,
                reference_head=self.teacher_head,
            )


def _check(logits: Tensor) -> None:
    if not bool(torch.isfinite(logits).all()):
        raise Diverged

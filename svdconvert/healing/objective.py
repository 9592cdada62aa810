"""KL(dense || compressed) of the predictions on some sequences, and its gradient with respect to the factors.

Several processes take a part of the sequences each, and all of them get the sums over all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from typing import ClassVar

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.healing.distance import NO_HINTS, Hints
from svdconvert.healing.precision import computing
from svdconvert.healing.student import Student
from svdconvert.healing.teacher import States
from svdconvert.machine import processes
from svdconvert.models.head import Head
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
        hints: what is minimised beside it; nothing of it is measured.
        name: of the mean, for people.
    """

    name: ClassVar[str] = "KL"
    student: Student
    teacher_head: Head | None
    tokens: CalibrationTokens
    batch_size: int
    precision: torch.dtype
    hints: Hints = NO_HINTS

    def measure(self, teacher: States, sequences: Tensor, precision: torch.dtype | None = None) -> HeadDivergence:
        """Sums over the predicted tokens of some sequences.

        Args:
            teacher: has the dense model's states of them.
            sequences: their numbers.
            precision: of the matrix products, where it is another one.

        Raises:
            Diverged: a model gives no finite numbers.
        """

        def own() -> HeadDivergence:
            sums = HeadDivergence()
            with torch.no_grad(), self.student.computing_in(precision or self.precision):
                for part in self._parts(sequences):
                    hidden = self.student.hidden(self.tokens.ids[part], self.tokens.mask[part])
                    found, _ = self._compare(teacher, part, hidden, precision or self.precision, gradient=False)
                    sums += found
            return sums

        return _of_all(own)

    def differentiate(self, teacher: States, sequences: Tensor) -> float:
        """Add the gradient of the mean over the predicted tokens of some sequences, hints included, to the factors'.

        Returns:
            The mean divergence, nats.

        Raises:
            Diverged: as :meth:`measure`.
        """
        count, tokens, blocks = self._predicted(sequences), int(self.tokens.mask[sequences].sum()), self.hints.blocks

        def own() -> HeadDivergence:
            sums = HeadDivergence()
            for part in self._parts(sequences):
                mask = self.tokens.mask[part]
                with torch.enable_grad():
                    hidden, outputs = self.student.hidden_behind(self.tokens.ids[part], mask, blocks)
                found, slope = self._compare(teacher, part, hidden.detach(), self.precision, gradient=True)
                minimised, slopes = [hidden], [slope / count]
                # Outputs that come before all that is trained are what they are.
                if any(output.requires_grad for output in outputs):
                    wanted = [teacher.behind(index, part) for index in blocks]
                    with torch.enable_grad():
                        minimised.append(self.hints.sum(outputs, wanted, mask.to(hidden.device)))
                    slopes.append(torch.tensor(1 / tokens, device=hidden.device))
                torch.autograd.backward(minimised, slopes)
                sums += found
            return sums

        total = _of_all(own).kl
        self._add_gradients()
        return total / count

    def _add_gradients(self) -> None:
        """Give the factors the sums of all processes' gradients."""
        group = processes.current()
        if group.size == 1:
            return
        for gradient in self.student.gradients():
            group.add(gradient)

    def _parts(self, sequences: Tensor) -> Sequence[Tensor]:
        """The sequences of this process, as many at a time as may be."""
        own = sequences[processes.current().portion(len(sequences))]
        return own.split(self.batch_size) if len(own) else ()

    def _predicted(self, part: Tensor) -> int:
        return predicted_tokens(self.tokens.ids[part], self.tokens.mask[part])[0].numel()

    def _compare(
        self, teacher: States, part: Tensor, hidden: Tensor, precision: torch.dtype, *, gradient: bool
    ) -> tuple[HeadDivergence, Tensor]:
        with computing(self.student.device, precision):
            return head_divergence(
                self.student.head,
                teacher.states(part),
                hidden,
                self.tokens.ids[part],
                self.tokens.mask[part],
                check=require_finite,
                gradient=gradient,
                reference_head=self.teacher_head,
            )


def _of_all(own: Callable[[], HeadDivergence]) -> HeadDivergence:
    """The sums over all processes.

    Args:
        own: gives this process's.

    Raises:
        Diverged: in all processes, where one has raised it.
    """
    sums, group = None, processes.current()
    with suppress(Diverged):
        sums = own()
    told = torch.tensor([float(sums is None), *astuple(sums or HeadDivergence())], dtype=torch.float64)
    failed, kl, reference, other, tokens = group.add(told).tolist()
    if failed:
        raise Diverged
    return HeadDivergence(kl, reference, other, round(tokens))


def require_finite(logits: Tensor) -> None:
    """See that logits are finite.

    Raises:
        Diverged: they are not.
    """
    if not bool(torch.isfinite(logits).all()):
        raise Diverged

"""How far the predictions of two models are from each other, from their last hidden states.

The same means as those of :mod:`svdconvert.models.divergence`, for models that are run block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from svdconvert.models.head import Head
from svdconvert.models.loss import predicted_tokens, wide
from svdconvert.models.softmax import Labels, RunningSums


@dataclass(frozen=True)
class HeadDivergence:
    """Sums over predicted tokens, in nats; p is the reference, the dense model as a rule, q the other model.

    Attributes:
        kl: KL(p || q).
        reference: -log p of the text's own tokens.
        other: -log q of them.
        tokens: number of predicted tokens.
    """

    kl: float = 0.0
    reference: float = 0.0
    other: float = 0.0
    tokens: int = 0

    def __add__(self, more: HeadDivergence) -> HeadDivergence:
        """The sums over both."""
        return HeadDivergence(
            self.kl + more.kl, self.reference + more.reference, self.other + more.other, self.tokens + more.tokens
        )


def head_divergence(
    head: Head,
    reference: Tensor,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    check: Callable[[Tensor], None],
    gradient: bool = False,
    reference_head: Head | None = None,
) -> tuple[HeadDivergence, Tensor]:
    """Compare two models' last hidden states, some positions at a time.

    Args:
        head: of both models, or of the other one alone.
        reference, hidden: [batch, length, hidden], the last block's outputs of the reference and of the other model.
        ids, mask, check: see :func:`svdconvert.models.loss.next_token_loss`.
        gradient: whether to differentiate.
        reference_head: that of the reference, where it is another one; it has the same parts.

    Returns:
        ``(the sums, gradient [batch, length, hidden] of the sum of KL with respect to hidden)``; the gradient is zero
        where no token is predicted, and everywhere without ``gradient``.
    """
    rows, labels = (places.to(hidden.device) for places in predicted_tokens(ids, mask))
    theirs, ours = (states.reshape(-1, states.shape[-1]) for states in (reference, hidden))
    slope, sums = torch.zeros_like(ours), HeadDivergence()
    compare = _compare if len(head.parts) == 1 else _compare_parts
    for piece in torch.arange(rows.numel(), device=hidden.device).split(head.positions):
        with torch.no_grad():
            of_reference = (reference_head or head).final(theirs[rows[piece]])
        inputs = ours[rows[piece]].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            of_other = head.final(inputs)
        both = _Both(reference_head or head, head, of_reference, of_other.detach().requires_grad_(gradient), check)
        found, of_states = compare(both, labels[piece])
        sums += found
        if of_states is not None:
            (slope[rows[piece]],) = torch.autograd.grad(of_other, inputs, of_states)
    return sums, slope.view(hidden.shape)


@dataclass(frozen=True)
class _Both:
    """What goes into the heads of two models at some positions.

    Attributes:
        reference_head, head: their heads, which have the same parts.
        reference, other: [n, width] each; the second requires a gradient if one is wanted.
        check: see :func:`head_divergence`.
    """

    reference_head: Head
    head: Head
    reference: Tensor
    other: Tensor
    check: Callable[[Tensor], None]

    @contextmanager
    def logits(self, number: int, gradient: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Context with the logits of a part, of the reference and, differentiable if so wanted, of the other model."""
        other = nullcontext() if self.reference_head is self.head else self.reference_head.part(number)
        with self.head.part(number) as part, other as reference_part:
            with torch.no_grad():
                theirs = wide((reference_part or part)(self.reference))
            self.check(theirs)
            with torch.set_grad_enabled(gradient):
                ours = wide(part(self.other))
            self.check(ours)
            yield theirs, ours


def _compare(both: _Both, labels: Tensor) -> tuple[HeadDivergence, Tensor | None]:
    """The sums of some positions, and the gradient of KL if it is wanted, from logits of the whole vocabulary."""
    gradient = both.other.requires_grad
    with both.logits(0, gradient) as (theirs, logits):
        p, q, right = theirs.log_softmax(-1), logits.detach().log_softmax(-1), labels[:, None]
        expected = p.exp()
        # What has no probability adds nothing; both may be -inf there.
        kl = (expected * (p - q)).where(expected > 0, 0.0).sum(-1)
        nll, other = (-float(each.gather(1, right).double().sum()) for each in (p, q))
        found = HeadDivergence(float(kl.double().sum()), nll, other, len(labels))
        if not gradient:
            return found, None
        (slope,) = torch.autograd.grad(logits, both.other, q.exp() - expected)
    return found, slope


def _compare_parts(both: _Both, labels: Tensor) -> tuple[HeadDivergence, Tensor | None]:
    """The same from logits of one part of the vocabulary after the other, once for the sums and once for a gradient.

    KL is the mean of the difference of the logits under p, less that of the logarithms of both softmaxes' sums.
    """
    own = Labels(labels, both.head.parts)
    p, q = (RunningSums(wide(states.detach())) for states in (both.reference, both.other))
    apart = torch.zeros_like(p.sums, dtype=torch.float64)
    of_labels = apart.new_empty(2, len(labels))
    for number in range(len(both.head.parts)):
        with both.logits(number, gradient=False) as (theirs, ours):
            push = p.add(theirs)
            q.add(ours)
            rows, places = own.within(number, theirs)
            of_labels[0, rows], of_labels[1, rows] = theirs[rows, places].double(), ours[rows, places].double()
            apart = apart * p.scaled + (push.mul_(theirs.sub_(ours))).sum(-1, keepdim=True)
    ends = torch.cat([p.logarithms(), q.logarithms()], -1)
    kl = apart[:, 0] / p.sums[:, 0] - (ends[:, 0] - ends[:, 1])
    nll, other = (float(each.sum()) for each in ends.T - of_labels)
    found = HeadDivergence(float(kl.sum()), nll, other, len(labels))
    if not both.other.requires_grad:
        return found, None
    slope = torch.zeros_like(wide(both.other.detach()))
    for number in range(len(both.head.parts)):
        with both.logits(number, gradient=True) as (theirs, ours):
            push = (ours.detach() - q.highest).exp_().div_(q.sums)
            push -= (theirs - p.highest).exp_().div_(p.sums)
            slope += torch.autograd.grad(ours, both.other, push)[0]
    return found, slope.to(both.other.dtype)

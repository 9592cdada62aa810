"""How far the predictions of two models are from each other, from their last hidden states.

The same means as those of :mod:`svdconvert.models.divergence`, for models that are run block by block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svdconvert.models.loss import LOGIT_BYTES, predicted_tokens, wide


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
    head: nn.Module,
    reference: Tensor,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    vocabulary: int,
    check: Callable[[Tensor], None],
    gradient: bool = False,
    reference_head: nn.Module | None = None,
) -> tuple[HeadDivergence, Tensor]:
    """Compare two models' last hidden states, some positions at a time.

    Args:
        head: [n, hidden] -> logits [n, vocabulary], of both models, or of the other one alone.
        reference, hidden: [batch, length, hidden], the last block's outputs of the reference and of the other model.
        ids, mask, vocabulary, check: see :func:`svdconvert.models.loss.next_token_loss`.
        gradient: whether to differentiate.
        reference_head: that of the reference, where it is another one.

    Returns:
        ``(the sums, gradient [batch, length, hidden] of the sum of KL with respect to hidden)``; the gradient is zero
        where no token is predicted, and everywhere without ``gradient``.
    """
    rows, labels = (places.to(hidden.device) for places in predicted_tokens(ids, mask))
    theirs, ours = (states.reshape(-1, states.shape[-1]) for states in (reference, hidden))
    slope, sums = torch.zeros_like(ours), HeadDivergence()
    step = max(1, LOGIT_BYTES // (4 * vocabulary))
    for part in torch.arange(rows.numel(), device=hidden.device).split(step):
        with torch.no_grad():
            p = wide((reference_head or head)(theirs[rows[part]]))
            check(p)
            p = p.log_softmax(-1)
        inputs = ours[rows[part]].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = wide(head(inputs))
        check(logits)
        q, right = logits.detach().log_softmax(-1), labels[part, None]
        expected = p.exp()
        # What has no probability adds nothing; both may be -inf there.
        kl = (expected * (p - q)).where(expected > 0, 0.0).sum(-1)
        nll, other = (-float(each.gather(1, right).double().sum()) for each in (p, q))
        sums += HeadDivergence(float(kl.double().sum()), nll, other, part.numel())
        if gradient:
            (slope[rows[part]],) = torch.autograd.grad(logits, inputs, q.exp() - expected)
    return sums, slope.view(hidden.shape)

"""The end of a model's forward pass, from the last block's output to the loss, some positions at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Bytes of the logits that are computed at a time.
LOGIT_BYTES = 2**26


def next_token_loss(
    head: nn.Module,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    vocabulary: int,
    check: Callable[[Tensor], None],
    draws: Tensor | None = None,
    gradient: bool = False,
) -> tuple[float, int, Tensor]:
    """Cross-entropy of the next tokens, and its gradient.

    Args:
        head: [n, hidden] -> logits [n, vocabulary].
        hidden: [batch, length, hidden], the last block's output.
        ids: [batch, length], int64.
        mask: [batch, length], bool; False is padding. A position counts if neither it nor the next one is padding.
        vocabulary: size of a row of logits.
        check: called with every piece of logits; raises if they are not finite.
        draws: [batch, length] uniform numbers; the gradient is then that of labels drawn from the model.
        gradient: whether to differentiate.

    Returns:
        ``(sum of -log p of the text's own tokens in nats, tokens predicted, gradient [batch, length, hidden] of the
        sum)``; the gradient is zero where no token is predicted, and everywhere without ``gradient``.
    """
    rows, targets = predicted_tokens(ids, mask)
    targets = targets.to(hidden.device)
    drawn = None if draws is None else draws.reshape(-1)[rows].to(hidden.device)
    flat = hidden.reshape(-1, hidden.shape[-1])
    rows = rows.to(hidden.device)
    slope = torch.zeros_like(flat)
    total = 0.0
    step = max(1, LOGIT_BYTES // (4 * vocabulary))
    for part in torch.arange(rows.numel(), device=hidden.device).split(step):
        inputs = flat[rows[part]].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            logits = wide(head(inputs))
        check(logits)
        scores, right = logits.detach(), targets[part, None]
        with torch.no_grad():
            highest = scores.amax(-1, keepdim=True)
            push = (scores - highest).exp_()
            sums = push.sum(-1, keepdim=True)
            total += float((sums.log() + (highest - scores.gather(1, right))).double().sum())
        if gradient:
            wanted = right if drawn is None else draw(scores, drawn[part])[:, None]
            # The gradient of the cross-entropy: the model's probabilities, less 1 at the label.
            push.div_(sums).scatter_add_(1, wanted, sums.new_full(wanted.shape, -1))
            (slope[rows[part]],) = torch.autograd.grad(logits, inputs, push)
    return total, rows.numel(), slope.view(hidden.shape)


def predicted_tokens(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """``(positions that predict a token, those tokens)`` in the flattened batch, [n] int64 each; see the arguments of
    :func:`next_token_loss`."""
    has_next = torch.zeros_like(mask)
    has_next[:, :-1] = mask[:, :-1] & mask[:, 1:]
    rows = has_next.reshape(-1).nonzero().reshape(-1)
    return rows, torch.roll(ids, -1, dims=1).reshape(-1)[rows]


def wide(logits: Tensor) -> Tensor:
    """Logits in at least float32: half types lack the range and the digits for a softmax over a vocabulary."""
    return logits if logits.dtype == torch.float64 else logits.float()


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per row of [n, vocabulary] logits, by inverting the distribution function at ``uniform`` [n]."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    # Rounding may leave the total below 1.
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0].clamp_(
        max=logits.shape[-1] - 1
    )

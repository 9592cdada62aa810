"""The end of a model's forward pass, from the last block's output to the loss, some positions at a time.

A head that comes in parts is gone through once, for a loss and for its gradient alike, and where labels are drawn once
more before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from svdconvert.models.head import Head
from svdconvert.models.softmax import Draws, Labels, RunningSums


def next_token_loss(
    head: Head,
    hidden: Tensor,
    ids: Tensor,
    mask: Tensor,
    *,
    check: Callable[[Tensor], None],
    draws: Tensor | None = None,
    gradient: bool = False,
) -> tuple[float, int, Tensor]:
    """Cross-entropy of the next tokens, and its gradient.

    Args:
        head: of the model.
        hidden: [batch, length, hidden], the last block's output.
        ids: [batch, length], int64.
        mask: [batch, length], bool; False is padding. A position counts if neither it nor the next one is padding.
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
    for piece in torch.arange(rows.numel(), device=hidden.device).split(head.positions):
        inputs = flat[rows[piece]].requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            states = head.final(inputs)
        own = Labels(targets[piece], head.parts)
        wanted: Labels | Draws | None = own if gradient else None
        if wanted is not None and drawn is not None:
            wanted = _draws(head, states.detach(), drawn[piece], check)
        loss, of_states = _loss(head, states.detach(), own, wanted, check)
        total += loss
        if of_states is not None:
            (slope[rows[piece]],) = torch.autograd.grad(states, inputs, of_states)
    return total, rows.numel(), slope.view(hidden.shape)


def _loss(
    head: Head, states: Tensor, own: Labels, wanted: Labels | Draws | None, check: Callable[[Tensor], None]
) -> tuple[float, Tensor | None]:
    """The cross-entropy of some positions, and its gradient.

    The gradient is that of the other tokens' logits under the model's probabilities, less that of the label's logit
    by as much: where the label has nearly all the probability, both are small. Probabilities are known with the last
    part, so what earlier parts add is brought to each new sum, as in an online softmax.

    Args:
        head: of the model.
        states: [n, width], what goes into its parts.
        own: the text's own labels.
        wanted: those whose loss is differentiated, which may be its own; None for no gradient.
        check: see :func:`next_token_loss`.

    Returns:
        ``(sum of the losses of its own labels, gradient [n, width] of the sum of those that are wanted)``.
    """
    differentiates, alone = wanted is not None, len(head.parts) == 1
    states.requires_grad_(differentiates)
    sums = RunningSums(wide(states.detach()))
    of_labels, slope = torch.empty_like(sums.sums), torch.zeros((), device=states.device)
    pull = torch.empty_like(states, dtype=sums.sums.dtype) if differentiates and not alone else slope
    others = torch.zeros_like(sums.sums)
    for number in range(len(head.parts)):
        with head.part(number) as part:
            with torch.set_grad_enabled(differentiates):
                logits = wide(part(states))
            check(logits)
            scores = logits.detach()
            push = sums.add(scores)
            rows, places = own.within(number, scores)
            of_labels[rows, 0] = scores[rows, places]
            if wanted is None:
                continue
            rows, places = wanted.within(number, scores)
            if alone:
                # The model's probabilities, less 1 at the label; they are known at once, so no label is left out.
                push.div_(sums.sums)
                push[rows, places] -= 1
                (slope,) = torch.autograd.grad(logits, states, push)
            else:
                push[rows, places] = 0
                others = others * sums.scaled + push.sum(-1, keepdim=True)
                slope = slope * sums.scaled + torch.autograd.grad(logits, states, push)[0]
                pull[rows] = _gradient(part, states, rows, places)
    loss = float((sums.sums.log() + (sums.highest - of_labels)).double().sum())
    if not differentiates:
        return loss, None
    return loss, slope if alone else slope.addcmul_(pull, others, value=-1).div_(sums.sums).to(states.dtype)


def _gradient(part: nn.Sequential, states: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """The gradient of single logits, [k, width]: of the part's k rows at its k places."""
    linear, to_logits = part
    assert isinstance(linear, nn.Linear)
    weight = wide(linear.weight[places])
    output = (wide(states.detach()[rows]) * weight).sum(-1)
    if linear.bias is not None:
        output += linear.bias[places]
    output.requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(to_logits(output).sum(), output)
    return slope[:, None] * weight


def _draws(head: Head, states: Tensor, uniform: Tensor, check: Callable[[Tensor], None]) -> Draws:
    """Labels that are drawn from the model; of a head in parts, each part is multiplied once for them.

    Args:
        head: of the model.
        states: [n, width], what goes into its parts.
        uniform: [n] in [0, 1), float64.
        check: see :func:`next_token_loss`.
    """
    # Made before the first part is read: something small that stays behind each part keeps its memory from the next.
    masses = torch.zeros(len(uniform), len(head.parts), dtype=torch.float64, device=states.device)
    for number in range(len(head.parts) if len(head.parts) > 1 else 0):
        with head.part(number) as part, torch.no_grad():
            logits = wide(part(states))
        check(logits)
        masses[:, number] = torch.logsumexp(logits.double(), -1)
    return Draws(uniform, masses)


def head_batches(batches: Sequence[slice], length: int, head: Head) -> Sequence[slice]:
    """Batches of sequences for the head: larger ones where it is read part by part, again for each of them.

    Args:
        batches: of all sequences, one after the other.
        length: tokens of a sequence.
        head: of the model.
    """
    if len(head.parts) == 1:
        return batches
    begin, end = batches[0].start, batches[-1].stop
    step = max(batches[0].stop - begin, head.positions // length)
    return [slice(place, min(place + step, end)) for place in range(begin, end, step)]


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

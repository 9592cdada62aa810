"""The likelihood of a text under a model, and how far its predictions are from those of another model.

Perplexity alone does not measure faithfulness: an over-confident model improves on a text by any smoothing of its
predictions, and a fine-tuned one by learning the domain. The Kullback-Leibler divergence from the dense model's
distributions to the factored model's is zero only where both predict the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from svdconvert.errors import InputError
from svdconvert.foreign import CORRECT_CONFIG, foreign_code
from svdconvert.models.passages import Passage

# Positions whose logits are compared at a time: with a vocabulary of 256k tokens they take half a gigabyte in float32.
_POSITIONS = 512

# Nats by which a model's cross-entropy may exceed its entropy before it is called over-confident. Smoothing its
# predictions would gain about as much (the bundled model: 0.45).
_OVER_CONFIDENT = 0.1

# Windows at a time by default, and the bytes that their logits may take in float32.
_BATCH = 8
_LOGITS_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Divergence:
    """Means over all predicted tokens; p is the reference, the dense model as a rule, q the model. In nats.

    Attributes:
        kl: KL(p || q), the sum of p log(p / q) over the vocabulary.
        agreement: share of the tokens for which both have the same most likely one, 0 to 1.
        entropy: of p, the loss that the reference expects of itself.
        cross_entropy: -log p of the text, the loss that it really has. If that is much larger than its entropy, it is
            over-confident, and a smoother model has a lower perplexity without being a better copy.
        added: -log q of the text less ``cross_entropy``; the model's perplexity is exp(added) times the reference's.
    """

    kl: float
    agreement: float
    entropy: float
    cross_entropy: float
    added: float

    @property
    def over_confident(self) -> bool:
        """Whether the reference is so over-confident that a lower perplexity does not mean a better copy."""
        return self.cross_entropy - self.entropy > _OVER_CONFIDENT


@dataclass(frozen=True)
class Likelihoods:
    """Result of :func:`likelihoods`.

    Attributes:
        negative: sum of -log q over the predicted tokens, nats.
        divergence: from the reference, or None without one.
    """

    negative: float
    divergence: Divergence | None


@dataclass
class _Sums:
    """Sums over the tokens so far, in float64."""

    negative: float = 0.0
    count: int = 0
    against: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("kl", "same", "entropy", "cross"), 0.0))


@torch.inference_mode()
def likelihoods(
    model: torch.nn.Module,
    passage: Passage,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    reference: torch.nn.Module | None = None,
) -> Likelihoods:
    """Run a passage through a model, and through a reference if there is one.

    Args:
        model: causal language model.
        passage: the text; each token is predicted once.
        batch_size: windows at a time; None: 8, or fewer if their logits would take more than a gigabyte.
        progress: called with (tokens done, tokens in all).
        reference: causal language model of the same vocabulary, on the same device.

    Returns:
        Sums and means, accumulated in float64; a token's own values are computed in float32.

    Raises:
        InputError: the two have vocabularies of different sizes.
    """
    device = next(model.parameters()).device
    spans, targets, sums = passage.spans(), passage.tokens, _Sums()
    batch_size = batch_size or _usual_batch(model, passage)
    for i in range(0, len(spans), batch_size):
        batch = spans[i : i + batch_size]
        inputs, labels = (part.to(device) for part in passage.batch(batch))
        logits = _logits(model, inputs)
        theirs = None if reference is None else _logits(reference, inputs)
        if theirs is not None and theirs.shape != logits.shape:
            raise InputError(
                f"the models have vocabularies of {theirs.shape[-1]:,} and {logits.shape[-1]:,} tokens; only models of "
                "one vocabulary can be compared"
            )
        for row, (_, counted) in enumerate(batch):
            _add(
                sums, logits[row, -counted:], labels[row, -counted:], None if theirs is None else theirs[row, -counted:]
            )
        if progress:
            progress(sums.count, targets)
    assert sums.count == targets
    return Likelihoods(sums.negative, None if reference is None else _means(sums))


def _usual_batch(model: Any, passage: Passage) -> int:
    each = 4 * passage.width * int(model.config.vocab_size)
    return max(1, min(_BATCH, _LOGITS_BYTES // each))


def _logits(model: Any, inputs: Tensor) -> Tensor:
    with foreign_code("the model cannot be run", CORRECT_CONFIG):
        logits: Tensor = model(input_ids=inputs, use_cache=False).logits
    return logits


def _add(sums: _Sums, logits: Tensor, labels: Tensor, theirs: Tensor | None) -> None:
    """Add one window's tokens: logits [n, vocabulary], labels [n]."""
    sums.count += labels.numel()
    if theirs is None:
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        sums.negative += float(losses.double().sum())
        return
    for begin in range(0, labels.numel(), _POSITIONS):
        piece = slice(begin, begin + _POSITIONS)
        q, p = (values[piece].float().log_softmax(-1) for values in (logits, theirs))
        expected, right = p.exp(), labels[piece, None]
        sums.negative -= float(q.gather(1, right).double().sum())
        sums.against["cross"] -= float(p.gather(1, right).double().sum())
        sums.against["same"] += float((p.argmax(-1) == q.argmax(-1)).sum())
        # The products are taken from q before the sums: entropy and cross-entropy are nearly equal where KL is small.
        # Tokens that a model rules out have -inf, and what has no probability adds nothing.
        there = expected > 0
        sums.against["kl"] += float((expected * (p - q)).where(there, 0.0).sum(-1).double().sum())
        sums.against["entropy"] -= float((expected * p).where(there, 0.0).sum(-1).double().sum())


def _means(sums: _Sums) -> Divergence:
    kl, same, entropy, cross = (sums.against[name] / sums.count for name in ("kl", "same", "entropy", "cross"))
    return Divergence(kl, same, entropy, cross, sums.negative / sums.count - cross)

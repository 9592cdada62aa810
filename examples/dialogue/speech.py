"""Does it still speak? Loss, repetition and empty answers of a model, with samples to look at.

A plain SVD of a large model may leave one that repeats a single token, and no fine-tuning brings it back. This is
seen in a minute, before the hours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from examples.dialogue.settings import SpeechSettings


@dataclass(frozen=True)
class Speech:
    """What a model said.

    Attributes:
        perplexity: of the reference answers (or of the text), a mean over tokens.
        repetition: share of 4-grams of tokens that were said before in the same answer, a mean over answers.
        empty: share of answers without a character that is seen.
        answers: (prompt, answer) pairs, as many as are to be shown.
        reference_perplexity: of the model that was factored, on the same tokens; None without one.
        warnings: one sentence for each measure that is out of bounds.
    """

    perplexity: float
    repetition: float
    empty: float
    answers: tuple[tuple[str, str], ...]
    reference_perplexity: float | None
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return asdict(self)


def answer_perplexity(model: nn.Module, rows: Sequence[dict[str, list[int]]], device: torch.device) -> float:
    """exp of the loss of :func:`answer_losses`, at most exp(700).

    Args:
        model: a causal language model.
        rows: as the Trainer reads them.
        device: of the model.
    """
    return math.exp(min(answer_losses(model, rows, device)[0], 700.0))


@torch.no_grad()
def answer_losses(
    model: nn.Module,
    rows: Sequence[dict[str, list[int]]],
    device: torch.device,
    reference: nn.Module | None = None,
) -> tuple[float, float | None]:
    """Means over the labels that count, in nats.

    Args:
        model: a causal language model; its mode is kept.
        rows: as the Trainer reads them.
        device: of the model.
        reference: in evaluation mode on the same device, with the same vocabulary.

    Returns:
        The negative log-likelihood of the labels, and KL(reference || model) of the predictions, None without a
        reference.
    """
    training = model.training
    model.eval()
    loss, divergence, count = 0.0, 0.0, 0
    for row in rows:
        ids = torch.tensor([row["input_ids"]], device=device)
        labels = torch.tensor(row["labels"][1:], device=device)
        counted = labels != -100

        def predicted(asked: nn.Module, ids: Any = ids, counted: Any = counted) -> torch.Tensor:
            logits: torch.Tensor = asked(input_ids=ids, use_cache=False).logits[0, :-1][counted]
            return logits.float().log_softmax(-1)

        own = predicted(model)
        loss += float(F.nll_loss(own, labels[counted], reduction="sum"))
        if reference is not None:
            divergence += float(F.kl_div(own, predicted(reference), reduction="sum", log_target=True))
        count += int(counted.sum())
    model.train(training)
    count = max(count, 1)
    return loss / count, None if reference is None else divergence / count


@torch.no_grad()
def listen(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, list[int]]],
    settings: SpeechSettings,
    device: torch.device,
    reference_perplexity: float | None = None,
) -> Speech:
    """Let a model answer greedily, and judge.

    Args:
        model: a causal language model; its mode is kept.
        tokenizer: its tokenizer.
        rows: validation rows; prompts are what has no label, or the first half where everything has one.
        settings: limits, and how many answers.
        device: of the model.
        reference_perplexity: of the model that was factored, on the same rows.
    """
    rows = rows[: settings.samples]
    perplexity = answer_perplexity(model, rows, device)
    training = model.training
    model.eval()
    said, shown = [], []
    for row in rows:
        labels = row["labels"]
        start = next((i for i, label in enumerate(labels) if label != -100), 0) or max(len(labels) // 2, 1)
        prompt = torch.tensor([row["input_ids"][:start]], device=device)
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=settings.new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )[0, start:].tolist()
        answer = [token for token in output if token != tokenizer.eos_token_id]
        said.append(answer)
        shown.append((tokenizer.decode(row["input_ids"][:start]), tokenizer.decode(answer)))
    model.train(training)
    repetition = sum(map(repeated_fourgrams, said)) / max(len(said), 1)
    empty = sum(not text.strip() for _, text in shown) / max(len(shown), 1)
    return Speech(
        perplexity=perplexity,
        repetition=repetition,
        empty=empty,
        answers=tuple(shown[: settings.show]),
        reference_perplexity=reference_perplexity,
        warnings=tuple(_warnings(settings, perplexity, reference_perplexity, repetition, empty)),
    )


def repeated_fourgrams(tokens: Sequence[int]) -> float:
    """Share of the 4-grams that occurred earlier in the sequence; 0 for fewer than five tokens."""
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def _warnings(
    settings: SpeechSettings, perplexity: float, reference: float | None, repetition: float, empty: float
) -> list[str]:
    found = []
    if reference is not None and perplexity > settings.perplexity_ratio * reference:
        found.append(
            f"perplexity is {perplexity:,.1f}, {perplexity / reference:,.0f} times that of the model before "
            "factoring; take a higher rank, or a calibrated method"
        )
    if repetition > settings.repetition:
        found.append(f"{repetition:.0%} of what it says is repetition")
    if empty > settings.empty:
        found.append(f"{empty:.0%} of its answers are empty")
    return found

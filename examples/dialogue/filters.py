"""Dropping samples that are too long for a model, and splitting the others, with a count of what happened."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from examples.dialogue.schema import Report, Sample
from examples.dialogue.templates import cut, render, template_named
from svdconvert.errors import InputError

GROUPS = ("dialogue", "document")


@dataclass(frozen=True)
class Limits:
    """The longest samples to keep, in tokens of the model; None is no limit.

    Attributes:
        total: prompt, answer and the end-of-text token together.
        answer: the answer alone.
        passage: the passage alone.
        turns: turns of the history; older ones are left out and the sample is kept.
    """

    total: int | None = None
    answer: int | None = None
    passage: int | None = None
    turns: int | None = None

    @property
    def need_tokenizer(self) -> bool:
        """Whether tokens are counted at all."""
        return any(limit is not None for limit in (self.total, self.answer, self.passage))


def shape(
    samples: Sequence[Sample],
    report: Report,
    *,
    passage: str,
    template: str,
    limits: Limits,
    tokenizer: Any = None,
) -> list[Sample]:
    """Cut passages, shorten histories and drop what is too long; the report is told and ``kept`` is brought up to date.

    Lengths are those of the rendered text: prompt and answer are counted apart, as they are in training, where the
    loss begins with the answer.

    Args:
        samples: with documents as passages.
        report: of the file they came from.
        passage: ``span``, ``section`` or ``document``.
        template: that the prompt will be made with.
        limits: on the lengths.
        tokenizer: of the model; needed for limits in tokens.

    Raises:
        InputError: there is no such passage or template, or a tokenizer is needed.
    """
    row = template_named(template)
    if limits.need_tokenizer and tokenizer is None:
        raise InputError("limits in tokens need the model's tokenizer; give --tokenizer FOLDER")
    shaped: list[Sample] = []
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "total": []}
    for sample in samples:
        try:
            # A sample without any document has nothing to cut.
            sample = cut(sample, passage) if sample.passage else sample
        except LookupError as error:
            report.dropped[f"{error} to cut the passage to"] += 1
            continue
        if row.marks and sample.grounding is None:
            report.dropped["no grounding span to mark"] += 1
            continue
        if limits.turns is not None and len(sample.history) > limits.turns:
            sample = replace(sample, history=sample.history[len(sample.history) - limits.turns :])
            report.notes[f"the history was shortened to {limits.turns} turns"] += 1
        if tokenizer is not None:
            rendered = render(sample, template)
            counts = {
                "prompt": _tokens(tokenizer, rendered.prompt),
                "answer": _tokens(tokenizer, rendered.answer),
            }
            counts["total"] = counts["prompt"] + counts["answer"] + 1
            reason = _too_long(sample, counts, limits, tokenizer)
            if reason:
                report.dropped[reason] += 1
                continue
            for name, count in counts.items():
                lengths[name].append(count)
        shaped.append(sample)
    report.kept = len(shaped)
    if lengths["total"]:
        report.lengths = {name: _quantiles(counts) for name, counts in lengths.items()}
    return shaped


def split(
    samples: Sequence[Sample], fraction: float, *, seed: int = 0, by: str = "dialogue"
) -> tuple[list[Sample], list[Sample]]:
    """Training and validation samples; those of one dialogue, or of one document, stay together.

    Args:
        samples: in any order, which is kept.
        fraction: of the dialogues (or documents) that go to validation, at least one of them.
        seed: chooses them.
        by: ``dialogue`` or ``document``.

    Raises:
        InputError: there are fewer than two to choose from, or the fraction leaves nothing to train on.
    """
    if by not in GROUPS:
        raise InputError(f"samples cannot be split by {by!r}; choose {', '.join(GROUPS)}")
    names = [(sample.dialogue_id if by == "dialogue" else sample.doc_id) for sample in samples]
    groups = sorted(set(names))
    count = max(1, round(len(groups) * fraction))
    if not 0 < fraction < 1 or count >= len(groups):
        raise InputError(f"{fraction} of {len(groups)} {by}s leaves no training or no validation data; give another")
    chosen = set(random.Random(seed).sample(groups, count))
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for name, sample in zip(names, samples, strict=True):
        sides[name in chosen].append(sample)
    return sides


def keep_apart(training: Sequence[Sample], validation: Sequence[Sample], report: Report) -> list[Sample]:
    """The training samples whose dialogue has no sample in the validation data."""
    taken = {sample.dialogue_id for sample in validation}
    kept = [sample for sample in training if sample.dialogue_id not in taken]
    if len(kept) < len(training):
        report.dropped["the dialogue is in the validation data too"] += len(training) - len(kept)
        report.kept = len(kept)
    return kept


def _too_long(sample: Sample, counts: Mapping[str, int], limits: Limits, tokenizer: Any) -> str:
    if limits.answer is not None and counts["answer"] > limits.answer:
        return f"an answer of more than {limits.answer:,} tokens"
    if limits.passage is not None and _tokens(tokenizer, sample.passage) > limits.passage:
        return f"a passage of more than {limits.passage:,} tokens"
    if limits.total is not None and counts["total"] > limits.total:
        return f"prompt and answer of more than {limits.total:,} tokens"
    return ""


def _tokens(tokenizer: Any, text: str) -> int:
    # verbose: a text beyond the model's longest input is what is looked for here.
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _quantiles(counts: Sequence[int]) -> dict[str, int]:
    ordered = sorted(counts)
    places = {"median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
    return {name: ordered[min(len(ordered) - 1, int(place * len(ordered)))] for name, place in places.items()}

"""From samples or raw text to what the Trainer reads: token ids, and labels that are -100 where nothing is learned."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.dialogue.schema import Sample, read_jsonl
from examples.dialogue.settings import DataSettings
from examples.dialogue.templates import ELISION, Rendered, cut, render
from svdconvert.errors import InputError

IGNORED = -100


@dataclass(frozen=True)
class Encoded:
    """A data set as the Trainer takes it.

    Attributes:
        rows: input_ids and labels of each sample, lists of equal length.
        samples: the samples behind the rows, in the same order; empty for raw text.
        dropped: how many were left out, by reason.
        tokens: ids in all rows.
        counted: labels that the loss counts.
    """

    rows: list[dict[str, list[int]]]
    samples: list[Sample]
    dropped: Counter[str]

    @property
    def tokens(self) -> int:
        """Ids in all rows."""
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def counted(self) -> int:
        """Labels that the loss counts."""
        return sum(label != IGNORED for row in self.rows for label in row["labels"])


def rendered(sample: Sample, data: DataSettings) -> Rendered:
    """A sample as the settings want it in a prompt.

    Raises:
        LookupError: it does not say where the wanted part of its passage is.
    """
    return render(cut(sample, data.passage), data.template, elision=data.elision or ELISION)


def encode(sample: Sample, tokenizer: Any, data: DataSettings) -> dict[str, list[int]]:
    """Ids of prompt, answer and end-of-text token; labels of the answer and the end, or of all.

    Prompt and answer are tokenised apart and without special tokens, as they are when the model answers.

    Raises:
        LookupError: see :func:`rendered`.
    """
    text = rendered(sample, data)
    prompt = tokenizer(text.prompt, add_special_tokens=False, verbose=False)["input_ids"]
    answer = [*tokenizer(text.answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = prompt + answer
    return {"input_ids": ids, "labels": [IGNORED] * len(prompt) + answer if data.answer_only else list(ids)}


def dialogue_data(path: str | Path, tokenizer: Any, data: DataSettings, limit: int, seed: int) -> Encoded:
    """Encode a file of samples.

    Args:
        path: JSONL in this example's schema.
        tokenizer: the model's.
        data: template, passage and limits of length.
        limit: samples to use, chosen by the seed; 0: all.
        seed: see ``limit``.

    Raises:
        InputError: the file cannot be read, or no sample fits.
    """
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-text token, so a model could not learn where an answer ends")
    samples, report = read_jsonl(path)
    if limit and limit < len(samples):
        samples = random.Random(seed).sample(samples, limit)
    dropped = Counter(report.dropped)
    rows, kept = [], []
    for sample in samples:
        try:
            row = encode(sample, tokenizer, data)
        except LookupError as error:
            dropped[error.args[0]] += 1
            continue
        answer = len(tokenizer(sample.answer, add_special_tokens=False)["input_ids"])
        if answer > data.max_answer:
            dropped[f"answer longer than {data.max_answer} tokens"] += 1
        elif len(row["input_ids"]) > data.max_length:
            dropped[f"longer than {data.max_length} tokens"] += 1
        else:
            rows.append(row)
            kept.append(sample)
    if not rows:
        raise InputError(f"no sample of {path} can be used ({', '.join(f'{n} {why}' for why, n in dropped.items())})")
    return Encoded(rows, kept, dropped)


def text_data(path: str | Path, tokenizer: Any, length: int, limit: int, seed: int) -> Encoded:
    """Cut raw text into windows; documents follow each other with the end-of-text token between them.

    Args:
        path: .txt, .jsonl or .parquet, or a folder of them.
        tokenizer: the model's.
        length: tokens of a window; what is left at the end is dropped.
        limit: windows to use, chosen by the seed; 0: all.
        seed: see ``limit``.

    Raises:
        InputError: the text cannot be read or does not fill a window.
    """
    from svdconvert.calibration.text import load_texts

    stream: list[int] = []
    for text in load_texts(str(path)):
        stream += [*tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], tokenizer.eos_token_id]
    windows = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    if not windows:
        raise InputError(f"{path} has {len(stream)} tokens, less than one window of {length}")
    if limit and limit < len(windows):
        windows = random.Random(seed).sample(windows, limit)
    rest = len(stream) % length
    dropped = Counter({"tokens after the last whole window": rest} if rest else {})
    return Encoded([{"input_ids": window, "labels": list(window)} for window in windows], [], dropped)


def load_data(data: DataSettings, tokenizer: Any, seed: int) -> tuple[Encoded, Encoded]:
    """Training and validation data of a settings file.

    Raises:
        InputError: one of both cannot be used, or they share a dialogue.
    """
    files = ((data.train, data.limit), (data.validation, data.validation_limit))
    if data.kind == "text":
        train, validation = (text_data(path, tokenizer, data.max_length, limit, seed) for path, limit in files)
        return train, validation
    train, validation = (dialogue_data(path, tokenizer, data, limit, seed) for path, limit in files)
    shared = {one.dialogue_id for one in train.samples} & {one.dialogue_id for one in validation.samples}
    if shared:
        raise InputError(
            f"{data.train} and {data.validation} share {len(shared)} dialogues (one is {min(shared)}), so the "
            "evaluation would know the training; prepare them again"
        )
    return train, validation


def calibration_text(samples: Sequence[Sample], data: DataSettings, path: Path) -> Path:
    """Write the training samples, prompt and answer, as text for data-aware methods; one JSON object a line."""
    from examples.dialogue.schema import write_lines

    texts = (rendered(sample, data) for sample in samples)
    write_lines(path, [{"text": text.prompt + text.answer} for text in texts])
    return path

"""Calibration text that the dense model writes itself: no corpus is needed, and it is of the model's own distribution.

LLM-QAT (Liu et al., arXiv:2305.17888, section 3.1) fine-tunes quantised models on such text. As there, tokens are drawn
from the whole distribution; other than there, none of the first ones is the most likely one. A sequence begins as texts
do that the model reads: with the token that its tokenizer opens them with, or else behind the end of another text, or,
where the tokenizer has neither, with any token (as all do there).

The sequences are kept in a folder, some in each file, so that an interrupted run goes on and another one reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.calibration.text import CalibrationTokens, tokenizer_digest
from svdconvert.errors import InputError, JobError
from svdconvert.machine.processes import current
from svdconvert.models.sampling import Sampler
from svdconvert.models.tokenizer import OWN_TOKENIZER, opening_token
from svdconvert.planning.events import Events
from svdconvert.storage.disk import disk_errors
from svdconvert.storage.source import Source
from svdconvert.storage.tensor_files import read_note, read_tensors, write_tensors

# How sequences are written; another number where the same request would give others.
_SCHEME = 1


class SelfText:
    """The text of a request, written or to be written.

    Attributes:
        samples, length: of its sequences.
        digest: of all that the request depends on, hexadecimal.
    """

    def __init__(self, source: Source, tokenizer: Any, *, samples: int, length: int, seed: int) -> None:
        """Say what is to be written; nothing is run.

        Args:
            source: the dense model.
            tokenizer: of it.
            samples: sequences.
            length: tokens of each.
            seed: of the drawing.
        """
        self._source, self._tokenizer, self.samples, self.length, self._seed = source, tokenizer, samples, length, seed
        self._tokenizer_digest = tokenizer_digest(tokenizer)
        # Not the number of sequences: a larger one goes on where a smaller one ended.
        self._one = {
            "model": source.identity(),
            "config": dict(source.config),
            "tokenizer": self._tokenizer_digest,
            "length": length,
            "seed": seed,
            "scheme": _SCHEME,
        }
        self.digest = _digest({**self._one, "samples": samples})

    def tokens(self, folder: Path, *, device: str, events: Events) -> CalibrationTokens:
        """The sequences, from a folder as far as they are there; what is missing is written now.

        Several processes write a part each, and all of them must make this call.

        Args:
            folder: keeps them, in a folder of its own in it.
            device: that the model runs on.
            events: receiver of progress.

        Raises:
            InputError: the model does not fit into memory or cannot be run, or a file is damaged.
            JobError: the disk fails; the same call goes on.
        """
        group = current()
        place, key = folder / f"self-{_digest(self._one)[:16]}", _digest(self._one)
        sampler = Sampler(self._source, self.samples, self.length, device=device)
        batches = [range(i, min(i + sampler.batch, self.samples)) for i in range(0, self.samples, sampler.batch)]
        files = {batch: place / f"{batch.start:06d}-{batch.stop:06d}.safetensors" for batch in batches}
        missing = group.share([batch for batch in batches if not files[batch].is_file()])
        if missing:
            self._write(sampler, {batch: files[batch] for batch in missing[group.rank :: group.size]}, key, events)
            group.wait()
        ids = torch.cat([self._read(file, len(batch), key) for batch, file in files.items()])
        return CalibrationTokens(
            ids=ids,
            mask=torch.ones_like(ids, dtype=torch.bool),
            texts_used=0,
            tokens=ids.numel(),
            text_digest=self.digest,
            tokenizer_digest=self._tokenizer_digest,
            seed=self._seed,
        )

    def _write(self, sampler: Sampler, files: Mapping[range, Path], key: str, events: Events) -> None:
        """Write some of the sequences."""
        if not files:
            return
        first, after = self._begin(sampler.vocabulary)
        total, before = sum(map(len, files)) * self.length, 0
        events.note(
            f"{self._source.name} writes {total:,} tokens to calibrate with; it is in memory whole for that, in "
            f"{str(sampler.dtype).removeprefix('torch.')}"
        )
        model = sampler.load()
        for batch, file in files.items():
            uniform = torch.stack([self._draws(row) for row in batch])
            # the first number of a row is that of a token which is drawn evenly, the others invert the model's
            starts = (uniform[:, 0] * sampler.vocabulary).long() if first is None else torch.full((len(batch),), first)

            def tell(position: int, done: int = before, rows: int = len(batch)) -> None:
                events.progress("writing text", done + position * rows, total)

            ids = sampler.write(model, starts, uniform, after=after, progress=tell)
            self._source.refuse_changed()
            with disk_errors(file.parent):
                file.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(file, {"ids": ids}, note=key)
            before += ids.numel()

    def _begin(self, vocabulary: int) -> tuple[int | None, tuple[int, int] | None]:
        """The token that every sequence begins with, or None for any; and what follows the end of a text within one.

        Raises:
            InputError: the tokenizer is not the model's.
        """
        opening, end = opening_token(self._tokenizer), self._tokenizer.eos_token_id
        for token in (opening, end):
            if token is not None and token >= vocabulary:
                raise InputError(
                    f"the tokenizer of {self._source.where} has the token {token}, but the model knows {vocabulary:,}; "
                    f"the tokenizer belongs to another model, so {OWN_TOKENIZER}"
                )
        if opening is None:
            return end, None
        return opening, None if end is None else (end, opening)

    def _draws(self, row: int) -> Tensor:
        """The random numbers of a sequence, whatever batches and processes are: [length], float64 in [0, 1)."""
        word = hashlib.blake2b(f"self {self._seed} {row}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(word, "big") >> 1)
        return torch.rand(self.length, generator=generator, dtype=torch.float64)

    def _read(self, file: Path, rows: int, key: str) -> Tensor:
        """The sequences of a file: [rows, length], int64."""
        if not file.is_file():
            raise JobError(f"{file} is missing; run the same command to write it again")
        ids: Tensor = read_tensors(file, ("ids",))["ids"]
        if read_note(file) != key or ids.shape != (rows, self.length) or ids.dtype != torch.int64:
            raise InputError(f"{file} holds other sequences than its name says; remove it and run the command again")
        return ids


def _digest(request: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(request, sort_keys=True).encode(), digest_size=16).hexdigest()

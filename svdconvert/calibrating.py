"""From a calibration text to the statistics of every target: what the user chose, and what it is identified by."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svdconvert.errors import InputError
from svdconvert.events import Events
from svdconvert.metrics import Method
from svdconvert.source import Source

if TYPE_CHECKING:
    from svdconvert.calibration import ModuleStatistics
    from svdconvert.corpus import CalibrationTokens


class StatisticsProvider(Protocol):
    """Gives the statistics of block after block, in whatever order they arise."""

    def __call__(self, *, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
        """Yield ``(block, {module: statistics})`` for all blocks but those to skip."""
        ...


@dataclass(frozen=True)
class Calibration:
    """The text that a data-aware method looks at.

    Attributes:
        text: a .txt, .jsonl or .parquet file, a folder of such files, or the name of a dataset.
        field: the field of a record that holds its text.
        samples: sequences to read.
        length: tokens in each; None takes the model's longest context, at most 2048.
        seed: chooses the sequences.
        batch_size: sequences at a time.
        labels: ``empirical``, the next token of the text, or ``sampled`` from the model's own prediction.
    """

    text: str
    field: str | None = None
    samples: int = 128
    length: int | None = None
    seed: int = 0
    batch_size: int = 8
    labels: str = "empirical"

    def __post_init__(self) -> None:
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"--calib-{name.replace('_', '-')} must be at least 1")
        if self.length is not None and self.length < 2:
            raise InputError("--calib-length must be at least 2, since every token is predicted from those before it")

    def tokens(self, source: Source) -> CalibrationTokens:
        """The text in the model's own tokens.

        Raises:
            InputError: the model has no tokenizer, or the text cannot be read or is too short.
        """
        from svdconvert.corpus import load_texts, sample_tokens
        from svdconvert.loading import load_tokenizer

        for name in source.side_files:
            folder = source.path(name).parent
        if not source.side_files:
            raise InputError(f"{source.name} has no tokenizer, so no text can be read with it")
        tokenizer = load_tokenizer(folder)
        length = self.length or min(2048, int(source.config.get("max_position_embeddings", 2048)))
        texts = load_texts(self.text, field=self.field)
        return sample_tokens(texts, tokenizer, samples=self.samples, length=length, seed=self.seed)

    def key(self, tokens: CalibrationTokens) -> dict[str, Any]:
        """What the statistics depend on beside the model, in JSON types."""
        samples, length = tokens.ids.shape
        return {
            "calibration": tokens.digest,
            "samples": samples,
            "length": length,
            "labels": self.labels,
            "seed": self.seed,
        }


def provider(
    source: Source,
    tokens: CalibrationTokens,
    calibration: Calibration,
    method: Method,
    modules: list[str],
    device: str,
    work: Path,
    events: Events,
) -> StatisticsProvider:
    """Statistics computed from the tokens, as far as the method needs them."""
    from svdconvert.calibration import Needs, statistics

    needs = Needs(**dict.fromkeys(method.statistics, True))

    def collect(*, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
        return statistics(
            source,
            tokens,
            needs,
            modules,
            device=device,
            work=work,
            batch_size=calibration.batch_size,
            labels=calibration.labels,
            seed=calibration.seed,
            skip_blocks=skip_blocks,
            events=events,
        )

    return collect

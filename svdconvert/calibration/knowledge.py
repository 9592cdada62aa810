"""From a calibration text to the statistics of every target: what the user chose, and what it is identified by."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svdconvert.errors import InputError
from svdconvert.families.fused import fused_layer, section_of
from svdconvert.families.table import dense_architecture, longest_input
from svdconvert.methods.table import Method
from svdconvert.names import layer_number
from svdconvert.planning.events import Events
from svdconvert.storage.source import Source
from svdconvert.version import __version__

if TYPE_CHECKING:
    from svdconvert.calibration.run import StatisticsRun
    from svdconvert.calibration.text import CalibrationTokens
    from svdconvert.methods.statistics import ModuleStatistics, Needs


# Sequences at a time, unless the user says otherwise.
BATCH_SIZE = 8


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
    batch_size: int = BATCH_SIZE
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
        from svdconvert.calibration.text import EmptyRows, load_texts, sample_tokens
        from svdconvert.models.loading import load_tokenizer

        folder = tokenizer_folder(source)
        if folder is None:
            raise InputError(f"{source.where} has no tokenizer, so no text can be read with it")
        tokenizer = load_tokenizer(folder)
        length = self.length or min(2048, longest_input(source.config, 2048))
        empty = EmptyRows()
        texts = load_texts(self.text, field=self.field, empty=empty)
        return sample_tokens(texts, tokenizer, samples=self.samples, length=length, seed=self.seed, empty=empty)


@dataclass(frozen=True)
class Knowledge:
    """Statistics that can be had, from a text or from a folder.

    Attributes:
        name: where they come from, for messages.
        key: what they depend on beside the model, in JSON types.
        text: the text itself, in the model's tokens.
        batch_size: sequences at a time.
        options: options of the command line that lead to the same, with stand-ins for names of files.
        collect: (method, modules, device, work folder, events) -> their provider.
    """

    name: str
    key: Mapping[str, Any]
    text: CalibrationTokens
    batch_size: int
    options: Mapping[str, Any]
    collect: Callable[[Method, Sequence[str], str, Path, Events], StatisticsProvider]


def default_method(asked: str | None, calibration: Calibration | None, stats: str | os.PathLike[str] | None) -> str:
    """The method asked for; else kfac where there is a text to look at, and svd where there is none."""
    return asked or ("svd" if calibration is None and stats is None else "kfac")


def check_knowledge(
    method: Method, calibration: Calibration | None, stats: str | os.PathLike[str] | None, *, refit: str = "none"
) -> None:
    """See that a method, and a refit, are given what they look at, and no more.

    Raises:
        InputError: both a text and statistics, neither where one is needed, or one where none is.
    """
    if calibration is not None and stats is not None:
        raise InputError("give either --calib, a text, or --stats, what was collected from one")
    if method.statistics and calibration is None and stats is None:
        raise InputError(f"--method {method.name} needs a text to look at: --calib FILE")
    if refit != "none" and calibration is None and stats is None:
        raise InputError(f"--refit {refit} needs a text to look at: --calib FILE")
    if not method.statistics and refit == "none" and (calibration is not None or stats is not None):
        raise InputError(f"--calib means nothing to --method {method.name}, which looks at the weights alone")


def check_parts(method: Method, *, collected: bool, split_fused: bool) -> None:
    """See that what a method looks at can be had for the parts of fused projections.

    Args:
        method: the method.
        collected: whether its statistics are those that :func:`calibrate` has written.
        split_fused: whether there are parts.

    Raises:
        InputError: it cannot, since a Fisher vector is a sum over all outputs of a layer.
    """
    if split_fused and collected and "fisher" in method.statistics:
        raise InputError(
            f"--method {method.name} with --split-fused needs the text itself, --calib FILE, and no other method "
            "beside it: collected statistics have the Fisher information of whole layers only"
        )


def find_knowledge(
    source: Source, calibration: Calibration | None, stats: str | os.PathLike[str] | None, events: Events
) -> Knowledge | None:
    """Statistics from a text or from the folder that :func:`calibrate` has written; None without either.

    Raises:
        InputError: the text or the folder cannot be used.
    """
    if calibration is not None:
        found = from_text(source, calibration)
        for note in found.text.notes:
            events.note(note)
        return found
    return None if stats is None else from_folder(source, Path(stats).expanduser())


def from_text(source: Source, calibration: Calibration) -> Knowledge:
    """Statistics to be computed from a text, as far as the method needs them.

    Raises:
        InputError: the text cannot be used.
    """
    tokens = calibration.tokens(source)
    samples, length = tokens.ids.shape

    def collect(method: Method, modules: Sequence[str], device: str, work: Path, events: Events) -> StatisticsProvider:
        def provide(*, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
            return run_statistics(
                source, tokens, calibration, method.statistics, modules, device, work, events, skip_blocks
            )

        return provide

    key = {
        "calibration": tokens.digest,
        "tokens": tokens.tokens,
        "samples": samples,
        "length": length,
        "labels": calibration.labels,
        "seed": calibration.seed,
    }
    options = {
        "--calib": "TEXT",
        "--calib-field": calibration.field,
        "--calib-samples": samples,
        "--calib-length": length,
        "--calib-batch-size": calibration.batch_size,
        "--labels": calibration.labels,
        "--seed": calibration.seed,
    }
    return Knowledge(calibration.text, key, tokens, calibration.batch_size, options, collect)


def from_folder(source: Source, folder: Path) -> Knowledge:
    """Statistics that :func:`calibrate` has written.

    Raises:
        InputError: there are none, or they are of another model, tokenizer or version.
    """
    from svdconvert.calibration.folder import StatisticsFolder, model_key
    from svdconvert.calibration.text import tokenizer_digest
    from svdconvert.models.loading import has_tokenizer, load_tokenizer

    expected = {"model": model_key(source), "version": __version__}
    side = tokenizer_folder(source)
    if side is not None and has_tokenizer(side):  # else there is none that could be another one
        expected["tokenizer"] = tokenizer_digest(load_tokenizer(side))
    found = StatisticsFolder(folder, expected)
    key, text, row = found.key, found.tokens(), dense_architecture(source.config, source.where)

    def collect(method: Method, modules: Sequence[str], device: str, work: Path, events: Events) -> StatisticsProvider:
        layers = {name: fused_layer(row, name) or name for name in modules}

        def provide(*, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
            from svdconvert.calibration.collector import part_statistics

            blocks: dict[int, list[str]] = {}
            for module in modules:
                blocks.setdefault(layer_number(module), []).append(module)
            for block, names in blocks.items():
                if block in skip_blocks:
                    continue
                wholes = found.load(list(dict.fromkeys(layers[name] for name in names)), method.statistics)
                entries = {}
                for name in names:
                    section, whole = section_of(row, source.config, name), wholes[layers[name]]
                    entries[name] = whole if section is None else part_statistics(whole, section)
                yield block, entries

        return provide

    settings = {name: key[name] for name in ("samples", "length", "labels", "seed")}
    settings = {"calibration": text.digest, "tokens": text.tokens, **settings}
    return Knowledge(str(folder), settings, text, BATCH_SIZE, {"--stats": "STATS"}, collect)


def tokenizer_folder(source: Source) -> Path | None:
    """Where a model's tokenizer is, if it has any files beside its weights."""
    paths = {name: source.path(name) for name in source.side_files}
    folders = [path.parent for name, path in paths.items() if "/" not in name]
    return folders[-1] if folders else None


def needs_of(kinds: Collection[str]) -> Needs:
    from svdconvert.methods.statistics import Needs

    return Needs(**dict.fromkeys(kinds, True))


def run_statistics(
    source: Source,
    tokens: CalibrationTokens,
    calibration: Calibration,
    kinds: Collection[str],
    modules: Sequence[str],
    device: str,
    work: Path,
    events: Events,
    skip_blocks: Collection[int],
) -> StatisticsRun:
    from svdconvert.calibration.run import StatisticsRun

    return StatisticsRun(
        source,
        tokens,
        needs_of(kinds),
        modules,
        device=device,
        work=work,
        batch_size=calibration.batch_size,
        labels=calibration.labels,
        seed=calibration.seed,
        skip_blocks=skip_blocks,
        events=events,
    )

"""From a calibration text to the statistics of every target: what the user chose, and what it is identified by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from svdconvert.errors import InputError
from svdconvert.families.fused import fused_layer, section_of
from svdconvert.families.table import dense_architecture, longest_input
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.methods.table import Method
from svdconvert.names import expert, layer_number
from svdconvert.planning.events import Events
from svdconvert.settings.text import BATCH_SIZE, Stats, Text
from svdconvert.storage.source import Source
from svdconvert.version import __version__

if TYPE_CHECKING:
    from svdconvert.calibration.run import StatisticsRun
    from svdconvert.calibration.self_text import SelfText
    from svdconvert.calibration.text import CalibrationTokens
    from svdconvert.methods.statistics import ModuleStatistics, Needs
    from svdconvert.models.activations import Loss


class StatisticsProvider(Protocol):
    """Gives the statistics of block after block, in whatever order they arise."""

    def __call__(self, *, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
        """Yield ``(block, {module: statistics})`` for all blocks but those to skip."""
        ...


@dataclass(frozen=True)
class Calibration(Text):
    """The text that a data-aware method uses.

    Attributes:
        text: a .txt, .jsonl or .parquet file, a folder of such files, or the name of a dataset; or ``self``, for text
            that the dense model writes, with all its weights in memory (a file of that name is ``./self``).
        field: the field of a record that holds its text.
        samples: sequences to read, or to write.
        length: tokens in each; None takes the model's longest context, at most 2048.
        seed: chooses the sequences, or draws their tokens.
        batch_size: sequences at a time.
        labels: ``empirical``, the next token of the text, or ``sampled`` from the model's own prediction.
    """

    def tokens(
        self, source: Source, *, folder: Path | None = None, device: str = "cpu", events: Events | None = None
    ) -> CalibrationTokens:
        """The text in the model's own tokens.

        Args:
            source: the dense model.
            folder: keeps a text that the model writes, which is read from there where it was written before; None
                keeps nothing.
            device: that the model writes it on.
            events: receiver of progress.

        Raises:
            InputError: the model has no tokenizer, or the text cannot be read or is too short; the model has no room
                to write it.
        """
        if not self.by_model:
            return read_tokens(source, self)
        return write_tokens(self_text(source, self), folder, device, events or Events())


def read_tokens(source: Source, text: Text) -> CalibrationTokens:
    """A text in a model's own tokens.

    Raises:
        InputError: the model has no tokenizer, or the text cannot be read or is too short.
    """
    from svdconvert.calibration.text import EmptyRows, load_texts, sample_tokens

    empty = EmptyRows()
    texts = load_texts(text.text, field=text.field, empty=empty)
    length = _length(source, text)
    return sample_tokens(texts, _tokenizer(source), samples=text.samples, length=length, seed=text.seed, empty=empty)


def self_text(source: Source, text: Text) -> SelfText:
    """A text that the model writes, not written yet.

    Raises:
        InputError: the model has no tokenizer.
    """
    from svdconvert.calibration.self_text import SelfText

    length = _length(source, text)
    return SelfText(source, _tokenizer(source), samples=text.samples, length=length, seed=text.seed)


def write_tokens(text: SelfText, folder: Path | None, device: str, events: Events) -> CalibrationTokens:
    """The tokens of a text that the model writes; see :meth:`svdconvert.calibration.self_text.SelfText.tokens`.

    Args:
        text, device, events: see there.
        folder: None keeps nothing.
    """
    with temporary_folder() if folder is None else nullcontext(folder) as place:
        return text.tokens(place, device=device, events=events)


def _length(source: Source, text: Text) -> int:
    """Tokens of a sequence."""
    return text.length or min(2048, longest_input(source.config, 2048))


def _tokenizer(source: Source) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: it has none.
    """
    from svdconvert.models.tokenizer import load_tokenizer

    folder = tokenizer_folder(source)
    if folder is None:
        raise InputError(f"{source.where} has no tokenizer, so no text can be read with it")
    return load_tokenizer(folder)


@dataclass(frozen=True)
class Knowledge:
    """Statistics that can be had, from a text or from a folder.

    Attributes:
        name: where they come from, for messages.
        key: what they depend on beside the model, in JSON types; of a text that the model writes, what was asked for.
        read: gives the text, in the model's tokens.
        batch_size: sequences at a time.
        repeatable: the request for the same, with actual numbers and stand-ins for file names.
        collect: (method, modules, device, work folder, events, whether they are to be exact) -> their provider; see
            :class:`svdconvert.calibration.run.StatisticsRun`.
        dense_loss: the model's loss on the text as far as it is known by now, which collecting tells; None if not.
    """

    name: str
    key: Mapping[str, Any]
    read: Callable[[], CalibrationTokens]
    batch_size: int
    repeatable: Text | Stats
    collect: Callable[[Method, Sequence[str], str, Path, Events, bool], StatisticsProvider]
    dense_loss: Callable[[], Loss | None]

    @cached_property
    def text(self) -> CalibrationTokens:
        """The text itself. One that the model writes is written when it is first asked for, by all processes of a job
        together.

        Raises:
            InputError, JobError: the model cannot write it.
        """
        return self.read()

    @property
    def content(self) -> Mapping[str, Any]:
        """:attr:`key` with the digest of the text's tokens, whatever wrote it."""
        return {**self.key, "calibration": self.text.digest}


def find_knowledge(
    source: Source,
    calibration: Text | Stats | None,
    events: Events,
    *,
    folder: Path | None = None,
    device: str = "cpu",
) -> Knowledge | None:
    """Statistics from a text or from the folder that :func:`calibrate` has written; None without either.

    Args:
        source: the dense model.
        calibration: what is asked for.
        events: receiver of notes and progress.
        folder: keeps a text that the model writes; None keeps nothing.
        device: that it is written on.

    Raises:
        InputError: the text or the folder cannot be used.
    """
    if isinstance(calibration, Stats):
        return from_folder(source, calibration.folder)
    if calibration is None:
        return None
    if calibration.by_model:
        return from_model(source, calibration, folder, device, events)
    found = from_text(source, calibration)
    for note in found.text.notes:
        events.note(note)
    return found


def from_text(source: Source, calibration: Text) -> Knowledge:
    """Statistics to be computed from a text, as far as the method needs them.

    Raises:
        InputError: the text cannot be used.
    """
    tokens = read_tokens(source, calibration)
    request = replace(calibration, text="TEXT")
    return _from_tokens(source, request, calibration.text, tokens.digest, tokens.ids.shape, lambda: tokens)


def from_model(source: Source, calibration: Text, folder: Path | None, device: str, events: Events) -> Knowledge:
    """Statistics to be computed from a text that the model writes; it is written when it is needed.

    Args:
        source, calibration, folder, device, events: see :func:`find_knowledge`.

    Raises:
        InputError: the model has no tokenizer.
    """
    written = self_text(source, calibration)
    read = partial(write_tokens, written, folder, device, events)
    return _from_tokens(source, calibration, "its own text", written.digest, (written.samples, written.length), read)


def _from_tokens(
    source: Source,
    calibration: Text,
    name: str,
    digest: str,
    shape: Sequence[int],
    read: Callable[[], CalibrationTokens],
) -> Knowledge:
    """Statistics to be computed from sequences of a shape, [samples, length]."""
    samples, length = shape
    runs: list[StatisticsRun] = []

    def collect(
        method: Method, modules: Sequence[str], device: str, work: Path, events: Events, exact: bool
    ) -> StatisticsProvider:
        def provide(*, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
            run = run_statistics(
                source, found.text, calibration, method.statistics, modules, device, work, events, skip_blocks, exact
            )
            runs[:] = [run]
            return run

        return provide

    key = {
        "calibration": digest,
        "tokens": samples * length,
        "samples": samples,
        "length": length,
        "labels": calibration.labels,
        "seed": calibration.seed,
    }
    repeatable = replace(calibration, samples=samples, length=length)
    found = Knowledge(
        name,
        key,
        read,
        calibration.batch_size,
        repeatable,
        collect,
        dense_loss=lambda: runs[0].loss if runs else None,
    )
    return found


def from_folder(source: Source, folder: Path) -> Knowledge:
    """Statistics that :func:`calibrate` has written.

    Raises:
        InputError: there are none, or they are of another model, tokenizer or version.
    """
    from svdconvert.calibration.folder import StatisticsFolder, model_key
    from svdconvert.calibration.text import tokenizer_digest
    from svdconvert.models.tokenizer import has_tokenizer, load_tokenizer

    expected = {"model": model_key(source), "version": __version__}
    side = tokenizer_folder(source)
    if side is not None and has_tokenizer(side):  # else there is none that could be another one
        expected["tokenizer"] = tokenizer_digest(load_tokenizer(side))
    found = StatisticsFolder(folder, expected)
    key, text, row = found.key, found.tokens(), dense_architecture(source.config, source.where)

    def collect(
        method: Method, modules: Sequence[str], device: str, work: Path, events: Events, exact: bool
    ) -> StatisticsProvider:
        layers = {name: fused_layer(row, name) or name for name in modules}

        def provide(*, skip_blocks: Collection[int]) -> Iterator[tuple[int, Mapping[str, ModuleStatistics]]]:
            blocks: dict[int, list[str]] = {}
            for module in modules:
                blocks.setdefault(layer_number(module), []).append(module)
            for block, names in blocks.items():
                if block not in skip_blocks:
                    yield from ((block, entries) for entries in _in_parts(names, load))

        def load(names: Sequence[str]) -> dict[str, ModuleStatistics]:
            from svdconvert.calibration.collector import part_statistics

            wholes = found.load(list(dict.fromkeys(layers[name] for name in names)), method.statistics)
            entries = {}
            for name in names:
                section, whole = section_of(row, source.config, name), wholes[layers[name]]
                entries[name] = whole if section is None else part_statistics(whole, section)
            return entries

        return provide

    settings = {name: key[name] for name in ("samples", "length", "labels", "seed")}
    settings = {"calibration": text.digest, "tokens": text.tokens, **settings}
    return Knowledge(
        str(folder),
        settings,
        lambda: text,
        BATCH_SIZE,
        Stats(Path("STATS")),
        collect,
        dense_loss=lambda: found.loss,
    )


def _in_parts(
    names: Sequence[str], load: Callable[[Sequence[str]], dict[str, ModuleStatistics]]
) -> Iterator[Mapping[str, ModuleStatistics]]:
    """The statistics of a block's layers, those of many experts in parts that fit into memory.

    Args:
        names: the layers.
        load: gives those of some of them.
    """
    from svdconvert.calibration.collector import statistic_tensors
    from svdconvert.planning.expert_groups import ON_CPU

    units: dict[str, list[str]] = {}
    for name in names:
        units.setdefault(expert(name), []).append(name)
    part: dict[str, ModuleStatistics] = {}
    room = ON_CPU
    for unit in units.values():
        more = load(unit)
        tensors = {id(tensor): tensor for entry in more.values() for tensor in statistic_tensors(entry).values()}
        needed = sum(tensor.nbytes for tensor in tensors.values())
        if part and needed > room:
            yield part
            part, room = {}, ON_CPU
        part |= more
        room -= needed
        del more, tensors
    yield part


def tokenizer_folder(source: Source) -> Path | None:
    """Where a model's tokenizer is, if it has any files beside its weights."""
    paths = {name: source.path(name) for name in source.side_files}
    folders = [path.parent for name, path in paths.items() if "/" not in name]
    return folders[-1] if folders else None


def needs_of(kinds: Collection[str]) -> Needs:
    """Statistics to collect, from their names."""
    from svdconvert.methods.statistics import Needs

    return Needs(**dict.fromkeys(kinds, True))


def run_statistics(
    source: Source,
    tokens: CalibrationTokens,
    calibration: Text,
    kinds: Collection[str],
    modules: Sequence[str],
    device: str,
    work: Path,
    events: Events,
    skip_blocks: Collection[int],
    exact: bool = True,
) -> StatisticsRun:
    """The run that collects statistics of a text; see :class:`svdconvert.calibration.run.StatisticsRun`."""
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
        exact=exact,
    )

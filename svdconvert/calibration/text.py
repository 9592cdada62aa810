"""Calibration text: reading it from files, folders and data sets, and choosing token sequences from it."""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import random
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.models.tokenizer import opening_token
from svdconvert.sentences import asked
from svdconvert.settings.text import KINDS, text_path
from svdconvert.storage.documents import TEXT_ADVICE, open_regular, parse_json
from svdconvert.words import listing

# Lines of a text without blank lines are joined to documents of about this many characters.
GROUP_CHARACTERS = 2000

# No document is longer; read as a whole, a file without line ends could fill the memory.
MAX_LINE_BYTES = 100_000_000

# Sequences are drawn from so many times as many as are asked for; what comes later in a larger text is not read.
POOL = 32

# Documents that are tokenized at a time.
_BATCH = 64


@dataclass(frozen=True)
class CalibrationTokens:
    """Token sequences to calibrate with.

    Attributes:
        ids: [N, length], int64.
        mask: [N, length], bool; False is padding, which comes last in its row.
        texts_used: documents that were read.
        tokens: tokens that are not padding.
        text_digest: of the documents that were read.
        tokenizer_digest: of the tokenizer.
        seed: as given to :func:`sample_tokens`.
        notes: what a user should know of the text.
    """

    ids: Tensor
    mask: Tensor
    texts_used: int
    tokens: int
    text_digest: str = ""
    tokenizer_digest: str = ""
    seed: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the shapes.

        Raises:
            ValueError: ids and mask do not fit each other, or padding is not at the end.
        """
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape or self.mask.dtype != torch.bool:
            raise ValueError(
                f"ids {tuple(self.ids.shape)} and boolean mask {tuple(self.mask.shape)} must be [N, length]"
            )
        if bool((self.mask[:, 1:] & ~self.mask[:, :-1]).any()) or not bool(self.mask[:, 0].all()):
            raise ValueError("padding must come last in its row, after at least one token")

    @property
    def digest(self) -> str:
        """Digest of ids and mask."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr(tuple(self.ids.shape)).encode())
        digest.update(self.ids.contiguous().numpy().tobytes())
        digest.update(self.mask.contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class EmptyRows:
    """Rows of data that hold no text, and are passed over.

    Attributes:
        count: how many there were.
        first: where the first one is.
    """

    count: int = 0
    first: str = ""

    def add(self, where: str) -> None:
        """Count one."""
        self.count, self.first = self.count + 1, self.first or where

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say of them."""
        if not self.count:
            return ()
        what = (
            "1 row has no text (null) and is" if self.count == 1 else f"{self.count:,} rows have no text (null) and are"
        )
        return (f"{what} left out of the calibration: {self.first}{'' if self.count == 1 else ' and others'}",)


def load_texts(
    spec: str,
    *,
    field: str | None = None,
    empty: EmptyRows | None = None,
) -> Iterator[str]:
    """Documents of a text file, a folder of them, or a data set.

    Args:
        spec: a ``.txt`` file (documents are separated by blank lines; if there are none, lines are joined to documents
            of about :data:`GROUP_CHARACTERS` characters), a ``.jsonl`` or ``.parquet`` file, a folder with such files
            (read in the order of their names), or the name of a data set for ``datasets``, whose training
            split is read.
        field: key or column that holds the text; ``text`` by default. Text files have none.
        empty: counts the rows whose text is null.

    Yields:
        Documents that are not blank, one at a time; files are not held in memory.

    Raises:
        InputError: there is no such text, it cannot be read, or a line or field is not what it must be. It is raised
            while iterating.
    """
    empty = empty or EmptyRows()
    path = text_path(spec)
    if path is None:
        yield from _dataset(spec, field or "text", empty)
        return
    if path.is_dir():
        files = sorted(entry for entry in path.rglob("*") if entry.suffix in KINDS and entry.is_file())
        if not files:
            raise InputError(f"{spec} has no calibration text; give files that end in {', '.join(KINDS)}")
    else:
        files = [path]
    for file in files:
        readers = {".txt": _plain, ".jsonl": _json_lines, ".parquet": _parquet}
        if file.suffix not in readers:
            raise InputError(f"{file} has an unknown file type; give a file that ends in {', '.join(KINDS)}")
        try:
            yield from readers[file.suffix](file, field or "text", empty)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror or error})") from None


def sample_tokens(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    empty: EmptyRows | None = None,
) -> CalibrationTokens:
    """Choose token sequences.

    Documents are joined to one stream with the end-of-text token after each, as in pretraining, and the stream is cut
    into sequences; what remains at its end is dropped. Where the tokenizer opens every text with a token, every
    sequence begins with it, as everything does that the model reads in use. Some models are lost without it, and so are
    statistics of them (Gemma 3 270M on sequences of 512 tokens: perplexity 145 instead of 56, docs/real.md).
    ``samples`` of the first ``POOL * samples`` sequences are chosen at random, in the order of the text; fewer where
    the text has no more.

    Args:
        texts: documents.
        tokenizer: of the model.
        samples: sequences to choose.
        length: tokens of a sequence, at least 2.
        seed: chooses the sequences.
        empty: what was passed over among the documents.

    Raises:
        InputError: the text has too few tokens for one sequence.
    """
    if samples < 1 or length < 2:
        given = f"{asked('calibration.samples', samples)} and {asked('calibration.length', length)}"
        raise InputError(f"{given} are too small; use at least 1 sequence of at least 2 tokens")
    digest = _TextDigest()
    opening = opening_token(tokenizer)
    rows = _Rows(_tokenized(digest.over(texts), tokenizer, opening), length, opening)
    pool = list(islice(rows.iterate(), POOL * samples))
    if not pool:
        raise InputError(
            f"the calibration text is too short: {digest.count:,} documents with {rows.tokens:,} tokens, "
            f"but at least {length} are needed; give more text"
        )
    chosen = sorted(random.Random(seed).sample(range(len(pool)), min(samples, len(pool))))
    ids = torch.stack([torch.tensor(pool[i], dtype=torch.int64) for i in chosen])
    return CalibrationTokens(
        ids=ids,
        mask=torch.ones_like(ids, dtype=torch.bool),
        texts_used=digest.count,
        tokens=ids.numel(),
        text_digest=digest.hex(),
        tokenizer_digest=tokenizer_digest(tokenizer),
        seed=seed,
        notes=empty.notes if empty else (),
    )


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of all that decides how a tokenizer cuts text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # Set anew by every call; no property of the tokenizer.
        state.pop("truncation", None)
        state.pop("padding", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    state["eos"] = tokenizer.eos_token_id
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=16).hexdigest()


class _TextDigest:
    """Counts documents and digests them on their way."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        self.count = 0

    def over(self, texts: Iterable[str]) -> Iterator[str]:
        for text in texts:
            self.count += 1
            encoded = text.encode()
            self._digest.update(len(encoded).to_bytes(8, "little") + encoded)
            yield text

    def hex(self) -> str:
        return self._digest.hexdigest()


class _Rows:
    """A stream of documents cut into rows of tokens, and how many tokens there were in all.

    The opening token is put before every row that does not begin with it anyway, as one with a whole document does.
    """

    def __init__(self, documents: Iterator[array[int]], length: int, opening: int | None) -> None:
        self._documents, self._length, self._opening, self.tokens = documents, length, opening, 0

    def iterate(self) -> Iterator[array[int]]:
        """Yield the rows."""
        stream, begin = array("q"), 0
        for document in self._documents:
            self.tokens += len(document)
            stream.extend(document)
            while True:
                first = self._first(stream, begin)
                end = begin + self._length - len(first)
                if end > len(stream):
                    break
                yield first + stream[begin:end]
                begin = end
            del stream[:begin]
            begin = 0

    def _first(self, stream: array[int], begin: int) -> array[int]:
        """What is put before a row that begins there."""
        if self._opening is None or (begin < len(stream) and stream[begin] == self._opening):
            return array("q")
        return array("q", [self._opening])


def _tokenized(texts: Iterator[str], tokenizer: Any, opening: int | None) -> Iterator[array[int]]:
    """Token ids of each document, with what belongs before and after a text; a document without tokens gives none."""
    begin = [] if opening is None else [opening]
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    while group := list(islice(texts, _BATCH)):
        # verbose: documents may well be longer than the model's longest input, and are cut.
        for ids in tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]:
            if len(ids):
                yield array("q", [*begin, *ids, *end])


def _plain(file: Path, field: str, empty: EmptyRows) -> Iterator[str]:
    # A blank line between two others separates documents; those at the ends of a file do not.
    blank = separated = begun = False
    for line in _lines(file):
        separated = separated or (begun and blank and bool(line.strip()))
        blank, begun = not line.strip(), begun or bool(line.strip())
        if separated:
            break
    document: list[str] = []
    size = 0
    for line in _lines(file):
        if line.strip():
            document.append(line)
            size += len(line)
        if document and (not line.strip() if separated else size >= GROUP_CHARACTERS):
            yield "\n".join(document)
            document, size = [], 0
    if document:
        yield "\n".join(document)


def _lines(file: Path) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends."""
    position = 0
    with io.BufferedReader(open_regular(file, advice=TEXT_ADVICE), 1 << 20) as handle:
        for number, raw in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES), b"")):
            if len(raw) == MAX_LINE_BYTES:
                raise InputError(
                    f"{file} has a line of more than {MAX_LINE_BYTES:,} bytes (line {number + 1}); split it"
                )
            if number == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            try:
                yield raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{file} is not UTF-8 text (line {number + 1}, byte {position + error.start}); convert it first"
                ) from None
            position += len(raw)


def _json_lines(file: Path, field: str, empty: EmptyRows) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        entry = parse_json(line, f"{file}, line {number},", "correct it")
        if not isinstance(entry, dict):
            raise InputError(
                f"{file}, line {number}, is not a JSON object; every line must be one, with the field {field!r}"
            )
        if field not in entry:
            raise InputError(f"{file}, line {number}, has no field {field!r}; it has {_named(entry)}{_another()}")
        yield from _document(entry[field], field, f"{file}, line {number}", empty)


def _parquet(file: Path, field: str, empty: EmptyRows) -> Iterator[str]:
    try:
        parquet = import_module("pyarrow.parquet")
        broken: type[Exception] = import_module("pyarrow").ArrowException
    except ImportError:
        raise InputError(f"{file} needs the package pyarrow; install it with `pip install pyarrow`") from None
    try:
        with open_regular(file, advice=TEXT_ADVICE) as handle, parquet.ParquetFile(handle) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise InputError(f"{file} has no column {field!r}; it has {_named(names)}{_another()}")
            number = 0
            for rows in table.iter_batches(batch_size=1024, columns=[field]):
                for value in rows.column(0).to_pylist():
                    number += 1
                    yield from _document(value, field, f"{file}, row {number}", empty)
    except broken as error:
        raise InputError(f"{file} is not a readable parquet file ({str(error).splitlines()[0]})") from None


def _dataset(name: str, field: str, empty: EmptyRows) -> Iterator[str]:
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise InputError(
            f"{name} is neither a file nor a folder, and data sets need the package datasets; "
            "give a file, or install it with `pip install datasets`"
        ) from None
    try:
        rows = datasets.load_dataset(name, split="train", streaming=True)
        for number, row in enumerate(rows, 1):
            if field not in row:
                raise InputError(f"the data set {name} has no field {field!r}; it has {_named(row)}{_another()}")
            yield from _document(row[field], field, f"the data set {name}, row {number}", empty)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"{name} is neither a file nor a folder, and the data set of that name cannot be loaded ({reason})"
        ) from None


def _document(value: Any, field: str, where: str, empty: EmptyRows) -> Iterator[str]:
    if value is None:
        empty.add(where)
        return
    if not isinstance(value, str):
        raise InputError(f"{where}: the field {field!r} is {type(value).__name__}, not text{_another()}")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise InputError(f"{where}: the field {field!r} holds half a surrogate pair, which is not text; correct it")
    if value.strip():
        yield value


def _another() -> str:
    return f"; name another as {asked('calibration.field')}"


def _named(names: Iterable[str]) -> str:
    return listing([repr(name) for name in names], 8) or "none"

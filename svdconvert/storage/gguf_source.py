"""A model in GGUF, the form of llama.cpp, read as a checkpoint: names, values and settings as transformers has them."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.storage.documents import fill, open_regular, read_bytes, reading
from svdconvert.storage.gguf_config import (
    ROPE_FREQS,
    ROPE_LONG,
    ROPE_SHORT,
    architecture_of,
    config_of,
    quantised_types,
    stored_code,
)
from svdconvert.storage.gguf_data import GgufData, GgufPlace, need_gguf, need_types
from svdconvert.storage.gguf_header import Counted, GgufHeader, read_gguf_header
from svdconvert.storage.gguf_rows import GgufArchitecture
from svdconvert.storage.gguf_view import gguf_view
from svdconvert.storage.identity import file_digest, sampled_digest
from svdconvert.storage.source import FileSource
from svdconvert.storage.tensor_data import TensorData
from svdconvert.words import size

# What transformers takes for a token while it makes a tokenizer; measured: 2,800 bytes for Gemma 3, 3,400 for SmolLM2.
_TOKEN_BYTES = 3_500
# They have one value for two channels of a head.
_TABLES, _MOST_FACTORS = {"llama": (ROPE_FREQS,), "phi3": (ROPE_LONG, ROPE_SHORT)}, 4096


class GgufSource(FileSource):
    """A model in one GGUF file, or in several parts."""

    def __init__(
        self,
        files: Sequence[Path],
        where: str,
        *,
        repo: str | None = None,
        commit: str | None = None,
        readme: Path | None = None,
    ) -> None:
        """Read the headers.

        Args:
            files: the file, or all parts in order.
            where: its name in messages.
            repo: the repository on the Hub that they come from, or None.
            commit: commit hash on the Hub, or None.
            readme: its model card; it need not be there.

        Raises:
            InputError: a file is damaged, the model is not one that can be read, or the package gguf is missing.
        """
        super().__init__()
        need_gguf(where)
        self._paths = {path.name: path for path in files}
        self.name, self.where = where if repo else files[0].name, where
        self.repo, self.commit, self._readme = repo, commit, readme
        self.files = list(self._paths)
        self._headers = {path.name: read_gguf_header(path) for path in files}
        header = _joined(self._headers, where)
        need_types({tensor.kind for tensor in header.tensors.values()}, where)
        row = architecture_of(header, where)
        tables = self._tables(_TABLES.get(row.name, ()))
        self.config = config_of(header, row, where, tables)
        self._places: dict[str, GgufPlace] = {}
        self.tensors = {}
        for file, part in self._headers.items():
            for tensor in part.tensors.values():
                if tensor.name not in tables:
                    self._add(part, tensor.name, file, row)
        self.notes = _notes(header, where, sum(info.nbytes for info in self.tensors.values()))
        self.opening_bytes = _TOKEN_BYTES * _tokens(header)

    def _add(self, part: GgufHeader, name: str, file: str, row: GgufArchitecture) -> None:
        tensor, own = part.tensors[name], row.checkpoint_name(name)
        if own is None or len(tensor.shape) > 2:
            raise InputError(
                f"{self.where} has the tensor {name} of shape {list(tensor.shape)}, which no {row.model_type} model "
                "has; give the checkpoint that it was made from"
            )
        heads = 0
        if row.is_permuted(name):
            heads = self.config["num_key_value_heads" if ".attn_k." in name else "num_attention_heads"]
            if not heads or tensor.shape[0] % (2 * heads):
                raise InputError(
                    f"tensor {name} of {self.where} has {tensor.shape[0]:,} rows, which {heads} heads cannot share; "
                    "fetch it again"
                )
        place = GgufPlace(tensor, heads, row.is_offset(name), row.is_transposed(name))
        self._places[own] = place
        self.tensors[own] = place.info(own, file)

    def _tables(self, names: Sequence[str]) -> dict[str, list[float]]:
        """The tables of rotary factors that are there, by name.

        Raises:
            InputError: one is no such table.
        """
        found = {}
        for file, header in self._headers.items():
            for tensor in (header.tensors[name] for name in names if name in header.tensors):
                if tensor.type != "F32" or len(tensor.shape) != 1 or tensor.shape[0] > _MOST_FACTORS:
                    raise InputError(
                        f"{tensor.name} of {self.where} is of type {tensor.type} and shape {list(tensor.shape)}, so it "
                        "is no table of rotary factors; fetch the file again"
                    )
                path = self._paths[file]
                data = bytearray(tensor.nbytes)
                with reading(path), open_regular(path) as handle:
                    handle.seek(tensor.start)
                    if not fill(handle, memoryview(data)):
                        raise InputError(f"{path} ends within its tensor {tensor.name}; fetch it again")
                values = struct.unpack(f"<{tensor.shape[0]}f", data)
                if not all(map(math.isfinite, values)):
                    raise InputError(f"{tensor.name} of {self.where} has infinite entries; fetch the file again")
                found[tensor.name] = list(values)
        return found

    def path(self, file: str) -> Path:
        return self._paths[file] if file in self._paths else self.view() / file

    def data(self, file: str) -> TensorData:
        return GgufData(self._paths[file], file, self._places)

    def view(self) -> Path:
        """A folder that stands for the model where one is needed: its settings and the tokenizer, without weights.

        It is made when it is first asked for, and removed when the process ends. :func:`source_of_view` leads back.

        Raises:
            InputError: the installed transformers cannot read the tokenizer.
        """
        folder = gguf_view(list(self._paths.values()), self.config, self.where, tokenizer=self._has_tokenizer)
        _VIEWED[folder] = self
        return folder

    @property
    def side_files(self) -> list[str]:  # type: ignore[override]  # which files there are is known once they are made
        return sorted(path.name for path in self.view().iterdir() if path.name != "config.json")

    @property
    def _has_tokenizer(self) -> bool:
        return _tokens(next(iter(self._headers.values()))) > 0

    def card(self) -> str | None:
        if self._readme is None or not self._readme.is_file():
            return None
        return read_bytes(self._readme, "").decode("utf-8", errors="replace")

    def _content(self) -> dict[str, Any]:
        weights = {}
        for file, header in self._headers.items():
            places = [(tensor.start, tensor.nbytes) for tensor in header.tensors.values()]
            # the header holds vocabulary and settings, so all of it counts
            weights[file] = sampled_digest(self._paths[file], places, partial(_beginning, header.data))
        return {"weights": weights, "config": self.config}

    def side_identity(self) -> dict[str, Any]:
        # another version of transformers may make another tokenizer of the same file
        made = {name: file_digest(self.path(name)) for name in self.side_files}
        card = self._readme if self._readme is not None and self._readme.is_file() else None
        return {"side_file": made | ({} if card is None else {"README.md": file_digest(card)})}

    def _watched(self) -> list[Path]:
        return list(self._paths.values())


_VIEWED: dict[Path, GgufSource] = {}


def source_of_view(folder: Path) -> GgufSource | None:
    """The model that a folder stands for, see :meth:`GgufSource.view`; None for any other folder."""
    return _VIEWED.get(folder)


def _beginning(count: int, handle: io.FileIO) -> bytes:
    return handle.read(count)


def _joined(headers: Mapping[str, GgufHeader], where: str) -> GgufHeader:
    """The metadata of the first part with the tensors of all.

    Raises:
        InputError: the parts are not those of one model, or it is no model.
    """
    first, *others = headers.values()
    kind = first.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{where} is a GGUF file of the type {str(kind)[:40]!r}, not a model; give the model's file")
    count = first.metadata.get("split.count", 1)
    if count != len(headers) and not (count == 0 and not others):
        raise InputError(
            f"{where} is a part of a model in {str(count)[:20]} files, but there are {len(headers)} of it; fetch all, "
            "and leave them their names"
        )
    tensors = dict(first.tensors)
    for number, (file, header) in enumerate(list(headers.items())[1:], 1):
        if header.metadata.get("split.no") != number:
            raise InputError(f"{file} is not part {number + 1} of {where}; fetch it again")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            raise InputError(f"tensor {min(twice)} is in more than one part of {where}; fetch them again")
        tensors |= header.tensors
    expected = first.metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise InputError(
            f"{where} should have {str(expected)[:20]} tensors, but its parts hold {len(tensors):,}; fetch them again"
        )
    return GgufHeader(first.metadata, tensors, first.data)


def _tokens(header: GgufHeader) -> int:
    """Size of the vocabulary; 0 where there is none."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    return tokens.length if isinstance(tokens, Counted) else len(tokens) if isinstance(tokens, list) else 0


def _notes(header: GgufHeader, where: str, multiplied_out: int) -> tuple[str, ...]:
    """What a user should know of a file whose weights take so many bytes as they are read."""
    types = quantised_types(header)
    if not types:
        return ()
    floats = {tensor.type for tensor in header.tensors.values() if stored_code(tensor.type) == tensor.type}
    beside = f", beside {', '.join(sorted(floats))}" if floats else ""
    stored = sum(tensor.nbytes for tensor in header.tensors.values())
    return (
        f"{where} holds weights that were rounded to few bits ({types}{beside}); what is read, factored and compared "
        "with is those rounded weights, multiplied out to float32; sizes before are those of float32, "
        f"{size(multiplied_out)}, not of the file, {size(stored)}",
    )

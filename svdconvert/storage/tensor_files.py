"""Safetensors files that svdconvert writes for itself, with a digest of every tensor: changed data is never used.

The digests are in the header's metadata, so any reader of safetensors can open the files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.fields import TEXT, problem, record, table
from svdconvert.storage.disk import atomic_pieces, disk_errors
from svdconvert.storage.documents import fill, open_regular, parse_json, reading
from svdconvert.storage.headers import file_layout, header_bytes, parse_header
from svdconvert.storage.reader import as_bytes, torch_dtype
from svdconvert.tensors import CODES, TensorInfo

_DIGESTS, _NOTE = "digests", "note"
_HEADER = {"__metadata__": record({_DIGESTS: TEXT, _NOTE: TEXT})}
_TOLD = {"tensors": table(TEXT), _NOTE: TEXT}

# What to do about a file that is refused.
_REMOVE = "remove it and run again the command that wrote it"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: str = "") -> None:
    """Write a file, whole or not at all.

    Args:
        path: where to.
        tensors: by name; brought to the host one at a time.
        note: a text stored with them.

    Raises:
        JobError: it could not be written.
    """
    infos = [
        TensorInfo(name, CODES[str(tensor.dtype).removeprefix("torch.")], tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    digests = {info.name: _digest(info, _bytes(tensors[info.name])) for info in infos}
    sealed_digests = json.dumps({"tensors": digests, _NOTE: _text_digest(note)})
    layout = file_layout(infos, {_DIGESTS: sealed_digests, _NOTE: note})

    def pieces() -> Iterator[bytes | memoryview]:
        yield layout.header
        for name in sorted(tensors, key=layout.starts.__getitem__):
            yield _bytes(tensors[name])

    with disk_errors(path.parent):
        atomic_pieces(path, pieces())


def read_tensors(path: Path, names: Collection[str] | None = None, *, optional: Collection[str] = ()) -> dict[str, Any]:
    """Read tensors of a file, and check that they are what was written.

    Args:
        path: the file.
        names: the tensors to read; None for all.
        optional: further tensors, which may be missing.

    Raises:
        InputError: there is no such file, it lacks a tensor, or it is damaged.
    """
    infos, digests, _ = _read_header(path)
    wanted = list(infos) if names is None else [*names, *(name for name in optional if name in infos)]
    if not set(wanted) <= infos.keys() & digests.keys():
        raise _damaged(path)
    tensors = {}
    for name in wanted:
        info = infos[name]
        tensor = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        with reading(path), open_regular(path) as handle:
            handle.seek(info.start)
            if not fill(handle, as_bytes(tensor)):
                raise _damaged(path)
        if _digest(info, as_bytes(tensor)) != digests[name]:
            raise _damaged(path)
        tensors[name] = tensor
    return tensors


def read_note(path: Path) -> str:
    """The text stored with the tensors. Raises as :func:`read_tensors`."""
    return _read_header(path)[2]


def names_in(path: Path) -> Collection[str]:
    """Names of a file's tensors. Raises as :func:`read_tensors`."""
    return _read_header(path)[0].keys()


def sealed(state: Mapping[str, Any]) -> bytes:
    """JSON with a digest of itself."""
    return json.dumps({"digest": _text_digest(_canonical(state)), **state}, indent=1).encode()


def unseal(document: Mapping[str, Any], path: Path, advice: str = "") -> dict[str, Any]:
    """The document that :func:`sealed` was given.

    Args:
        document: the parsed JSON.
        path: its file.
        advice: what to do if it is damaged; by default, remove it.

    Raises:
        InputError: it was changed, or comes from a version that wrote no digests.
    """
    if "digest" not in document:
        raise InputError(
            f"{path} has no digest, so it comes from an earlier version of svdconvert; {advice or _REMOVE}"
        )
    state = {name: value for name, value in document.items() if name != "digest"}
    if document.get("digest") != _text_digest(_canonical(state)):
        raise _damaged(path, advice)
    return state


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str], str]:
    """``(tensors, digests, note)``."""
    try:
        handle = open_regular(path)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; run again the command that wrote it") from None
    with reading(path), handle:
        raw, count = header_bytes(handle), handle.seek(0, 2)
    try:
        infos = {info.name: info for info in parse_header(raw, path.name, count)}
        header = parse_json(raw[8:], path)
        if problem(header, _HEADER) is not None:
            raise _damaged(path)
        note = header["__metadata__"][_NOTE]
        sealed_digests = parse_json(header["__metadata__"][_DIGESTS], path)
    except InputError:
        raise _damaged(path) from None
    if problem(sealed_digests, _TOLD) is not None or sealed_digests[_NOTE] != _text_digest(note):
        raise _damaged(path)
    return infos, sealed_digests["tensors"], note


def _damaged(path: Path, advice: str = "") -> InputError:
    return InputError(f"{path} is damaged: its content is not what was written; {advice or _REMOVE}")


def _bytes(tensor: Tensor) -> memoryview:
    return as_bytes(tensor.cpu().contiguous())


def _digest(info: TensorInfo, data: memoryview) -> str:
    digest = hashlib.blake2b(json.dumps([info.name, info.dtype, list(info.shape)]).encode(), digest_size=16)
    digest.update(data)
    return digest.hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _canonical(state: Mapping[str, Any]) -> str:
    return json.dumps(state, sort_keys=True)

"""The safetensors container against the reference implementation."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from svdconvert.errors import InputError
from svdconvert.storage.headers import file_layout, parse_header, read_header
from svdconvert.tensors import CODES, DTYPES, TensorInfo

TYPES = ["float16", "bfloat16", "float32", "float64", "int64", "uint8", "bool"]
# Names that can be printed; others are refused, see below.
names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=12)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60)
@given(st.dictionaries(names, st.tuples(st.sampled_from(TYPES), shapes), max_size=8))
def test_reads_what_the_reference_writes(content: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    content.pop("__metadata__", None)
    tensors = {name: torch.ones(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in content.items()}
    raw = save(tensors, {"format": "pt"})
    found = {info.name: info for info in parse_header(raw, "file", len(raw))}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        info = found[name]
        assert (info.shape, DTYPES[info.dtype][1]) == (tuple(tensor.shape), str(tensor.dtype)[6:])
        data = raw[info.start : info.start + info.nbytes]
        assert data == tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else data == b""


@settings(max_examples=40)
@given(content=st.dictionaries(names, st.tuples(st.sampled_from(TYPES), shapes), min_size=1))
def test_the_reference_reads_what_we_lay_out(
    tmp_path_factory: pytest.TempPathFactory, content: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    content.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("layout") / "file.safetensors"
    infos = [TensorInfo(name, CODES[dtype], shape) for name, (dtype, shape) in content.items()]
    layout = file_layout(infos)
    data, starts = bytearray(layout.size), layout.starts
    data[: len(layout.header)] = layout.header
    for i, info in enumerate(infos):
        data[starts[info.name] : starts[info.name] + info.nbytes] = bytes([i % 2]) * info.nbytes
        assert starts[info.name] % DTYPES[info.dtype][0] == 0
    path.write_bytes(data)
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    found = load_file(path)
    assert found.keys() == content.keys()
    for i, info in enumerate(infos):
        tensor = found[info.name]
        assert tuple(tensor.shape) == info.shape
        assert tensor.reshape(-1).view(torch.uint8).eq(i % 2).all() if tensor.numel() else True
    assert {info.name: info for info in read_header(path)} == {
        info.name: TensorInfo(info.name, info.dtype, info.shape, path.name, starts[info.name]) for info in infos
    }


def header_of(entries: dict[str, object]) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "truncated"),
        (b"\0" * 7, "truncated"),
        (struct.pack("<Q", 2**60) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "truncated inside its header"),
        (struct.pack("<Q", 4) + b"oops", "not valid JSON"),
        (struct.pack("<Q", 4) + b"[12]", "not a JSON object"),
        (header_of({"a": {"dtype": "F32"}}), "no .shape."),
        (header_of({"a": ENTRY | {"dtype": "F4"}}), "unsupported type F4"),
        (header_of({"a": ENTRY | {"shape": [3]}}), "damaged header at tensor a"),
        (header_of({"a": ENTRY | {"data_offsets": [4, 12]}}), "damaged header at tensor a"),
        (header_of({"a": ENTRY, "b": ENTRY}), "damaged header"),
        (header_of({"a": ENTRY}), "truncated or damaged"),
        (header_of({"__metadata__": {"format": 1}}), "__metadata__"),
        (header_of({"__metadata__": []}), "__metadata__"),
        (header_of({"a": ENTRY | {"shape": [2.0]}}), "'shape' is"),
        (header_of({"a": ENTRY | {"shape": [True, 2]}}), "'shape' is"),
        (header_of({"a": ENTRY | {"shape": [-2]}}), "'shape' is"),
        (header_of({"a": ENTRY | {"shape": [1] * 65}}), "'shape' is"),
        (header_of({"a": ENTRY | {"shape": [2**62, 2**62]}}), "damaged header at tensor a"),
        (header_of({"a": ENTRY | {"data_offsets": [0, 8, 8]}}), "'data_offsets' is"),
        (header_of({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}), "damaged header at tensor b"),
        (header_of({"a" * 201: ENTRY}), "name has 201 bytes"),
        (header_of({"": ENTRY}), "name has 0 bytes"),
        (header_of({"a\x1b[2J": ENTRY}), r"cannot be printed \(a\\x1b\[2J\)"),
        (header_of({"a\u202e" * 99: ENTRY}), r"\.\.\.\); fetch it again$"),
        (header_of({"a": [ENTRY]}), "not an object"),
        (struct.pack("<Q", 18) + b'{"a": {}, "a": {}}', "'a' stands in it twice"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "nested more than 64 levels"),
    ],
)
def test_damage_is_named(raw: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        parse_header(raw, "file", len(raw))
    assert str(caught.value).isprintable()


def test_truncated_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="promises"):
        read_header(path)

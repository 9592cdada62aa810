"""Files that somebody else wrote: whatever they hold, reading them ends soon, and with one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdconvert.errors import InputError
from svdconvert.fields import COUNT, FLAG, NUMBER, TEXT, many, optional, problem, record, require, table
from svdconvert.storage.documents import (
    MAX_JSON_DEPTH,
    json_or_none,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)
from svdconvert.storage.pickled import load_pickled

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


def nested(depth: int, kind: str = "[") -> str:
    return {"[": "[" * depth + "]" * depth, "{": '{"a":' * depth + "1" + "}" * depth}[kind]


@given(values)
def test_parses_what_json_writes(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode("utf-8")):
        assert parse_json(text, "it") == value


@pytest.mark.parametrize("kind", ["[", "{"])
def test_depth_is_bounded_before_parsing(kind: str) -> None:
    assert parse_json(nested(MAX_JSON_DEPTH, kind), "it") is not None
    for depth in (MAX_JSON_DEPTH + 1, 10**6):
        with pytest.raises(InputError, match="it is nested more than 64 levels deep"):
            parse_json(nested(depth, kind), "it")
    # Torn off before its end, it is as deep.
    with pytest.raises(InputError, match="nested"):
        parse_json(kind * 10**6 if kind == "[" else '{"a":' * 10**6, "it")


def test_brackets_in_text_are_no_nesting() -> None:
    texts = ["[" * 1000, '\\"' + "{" * 1000, "\\", '"[[[[' * 100]
    assert parse_json(json.dumps(texts), "it") == texts
    assert len(parse_json(json.dumps([[]] * 1000), "it")) == 1000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"[1", "not valid JSON"),
        (b"\xff\xfe[\x001\x00]\x00", "not UTF-8 text"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (rb'{"a": "\ud800"}', "half a surrogate pair"),
        (b'{"unfinished', "not valid JSON"),
        (b'"' + b'\\"' * 200_000 + b"[" * 100, "not valid JSON"),
        (b"[" + b"1," * 10_000_001 + b"1]", "more than 10,000,000 values"),
    ],
)
def test_what_is_no_json(data: bytes, words: str) -> None:
    with pytest.raises(InputError, match=words):
        parse_json(data, "it")


def test_a_whole_pair_is_text() -> None:
    assert parse_json(r'"\ud83d\udc2f"', "it") == "🐯"


def test_keys_that_stand_twice() -> None:
    assert parse_json('{"a": 1, "a": 2}', "it") == {"a": 2}
    with pytest.raises(InputError, match="'a' stands in it twice"):
        parse_json('[{"b": {"a": 1, "a": 2}}]', "it", unique=True)


def test_only_objects(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[1]")
    with pytest.raises(InputError, match=r"file\.json does not hold a JSON object; do this"):
        read_json(path, "missing", "do this")
    assert json_or_none(path) is None
    with pytest.raises(InputError, match=r"^missing$"):
        read_json(tmp_path / "none", "missing")
    assert json_or_none(tmp_path / "none") is None
    path.write_text('{"a": [1]}')
    assert read_json(path, "") == json_or_none(path) == {"a": [1]}


@pytest.mark.parametrize("read", [read_json, read_bytes, read_text], ids=lambda read: read.__name__)
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a folder"),
        (lambda path: os.symlink("/dev/zero", path), "a device"),
    ],
    ids=["pipe", "folder", "device"],
)
def test_only_regular_files(read: Any, make: Any, kind: str, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(InputError, match=f"file cannot be read: it is {kind}, not a regular file; "):
        read(tmp_path / "file", "missing")


def test_links_to_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("텍스트")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link", "") == "텍스트"


def test_size_is_bounded_by_what_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, "", 5) == b"12345"
    with pytest.raises(InputError, match=r"file has 5 bytes, more than the 4 that"):
        read_bytes(path, "", 4)
    # Files of /proc say that they are empty.
    with pytest.raises(InputError, match=r"status has more than the 10 bytes"):
        read_bytes(Path("/proc/self/status"), "", 10)


def test_a_zero_byte_in_a_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_regular(tmp_path / "a\0b")


FIELDS = {
    "name": TEXT,
    "count": COUNT,
    "done": FLAG,
    "sizes": many(COUNT),
    "losses": table(NUMBER),
    "source": record({"name": TEXT}),
    "seed": optional(COUNT),
}
GOOD = {"name": "a", "count": 0, "done": True, "sizes": [1], "losses": {"a": 0.5}, "source": {"name": "b"}}


def test_good_documents() -> None:
    for more in ({}, {"seed": None}, {"seed": 3}, {"unknown": [1]}):
        assert problem(GOOD | more, FIELDS) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 1),
        ("count", -1),
        ("count", True),
        ("count", 1.0),
        ("count", 10**30),
        ("done", 1),
        ("sizes", [1, "a"]),
        ("sizes", {}),
        ("losses", {"a": float("nan")}),
        ("losses", {"a": float("inf")}),
        ("losses", [0.5]),
        ("source", {}),
        ("source", None),
        ("seed", "a"),
    ],
)
def test_wrong_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^FILE is damaged: its '{field}' is .*, not .*; do this$"):
        require(GOOD | {field: value}, FIELDS, "FILE", "do this")


def test_missing_fields_are_named() -> None:
    for field in GOOD:
        missing = {name: value for name, value in GOOD.items() if name != field}
        assert problem(missing, FIELDS) == f"it has no {field!r}"
    assert problem([1], FIELDS) == "it is [1], not an object"


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def test_pickles_hold_what_they_claim(tmp_path: Path) -> None:
    path = save(tmp_path / "a.bin", {"a": torch.zeros(1).expand(10**13)})
    with pytest.raises(InputError, match=r"tensor a in .*a\.bin claims 40,000,000,000,000 bytes, but 4 are stored"):
        load_pickled(path)
    path = save(tmp_path / "b.bin", {"a": torch.eye(3).to_sparse()})
    with pytest.raises(InputError, match=r"tensor a in .* is not a plain array"):
        load_pickled(path)
    path = save(tmp_path / "c.bin", {"a": torch.empty(10**12, device="meta")})
    with pytest.raises(InputError, match=r"tensor a in .* is not a plain array"):
        load_pickled(path)
    path = save(tmp_path / "d.bin", {"a" * 201: torch.zeros(1)})
    with pytest.raises(InputError, match="name has 201 bytes"):
        load_pickled(path)
    views = {"whole": torch.arange(12.0).view(3, 4), "row": torch.arange(12.0).view(3, 4).T}
    assert load_pickled(save(tmp_path / "e.bin", views)).keys() == views.keys()


def test_pickles_that_are_packed(tmp_path: Path) -> None:
    import zipfile

    whole = save(tmp_path / "whole.bin", {"a": torch.zeros(1000)})
    packed = tmp_path / "packed.bin"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.infolist():
            new.writestr(part.filename, old.read(part.filename))
    with pytest.raises(InputError, match=r"packed\.bin is packed at "):
        load_pickled(packed)
    os.mkfifo(tmp_path / "pipe.bin")
    with pytest.raises(InputError, match="is a pipe"):
        load_pickled(tmp_path / "pipe.bin")

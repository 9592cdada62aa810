"""Calibration text: every kind of file, the choice of sequences, and everything that can be wrong with a text."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdconvert.calibration.text import (
    POOL,
    CalibrationTokens,
    EmptyRows,
    load_texts,
    sample_tokens,
    tokenizer_digest,
)
from svdconvert.errors import InputError
from svdconvert.models.tokenizer import load_tokenizer

END = 2
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def tokenizer(dense: Path) -> Any:
    """One token per byte."""
    return load_tokenizer(dense)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def read(path: Path | str, **options: Any) -> list[str]:
    return list(load_texts(str(path), **options))


class TestText:
    @pytest.mark.parametrize(
        ("content", "documents"),
        [
            ("one\ntwo\n\nthree\n", ["one\ntwo", "three"]),
            ("one\r\ntwo\r\n \t\r\n\r\nthree", ["one\ntwo", "three"]),
            ("\n\none\ntwo\n\n", ["one\ntwo"]),
            ("\ufeff가나\n\n다", ["가나", "다"]),
            ("a\n" * 3, ["a\na\na"]),
            ("", []),
            (" \n\n", []),
        ],
    )
    def test_documents(self, write: Write, content: str, documents: list[str]) -> None:
        assert read(write("a.txt", content)) == documents

    def test_lines_are_grouped(self, write: Write) -> None:
        lines = [f"{i:04d} {'x' * 95}" for i in range(50)]
        documents = read(write("a.txt", "\n".join(lines)))
        assert "\n".join(documents).split("\n") == lines
        assert [document.count("\n") + 1 for document in documents] == [20, 20, 10]

    def test_not_utf8(self, write: Write) -> None:
        path = write("a.txt", "하나\n".encode() + "둘".encode("cp949"))
        with pytest.raises(InputError, match=re.escape(f"{path} is not UTF-8 text (line 2, byte 7)")):
            read(path)

    def test_lines_are_not_held_in_memory(self, write: Write) -> None:
        texts = load_texts(str(write("a.txt", "one\n\ntwo\n\n" + "three\n" * 1000)))
        assert next(texts) == "one"
        assert next(texts) == "two"


class TestJsonLines:
    def test_fields(self, write: Write) -> None:
        lines = [{"text": "하나", "body": "1"}, {"text": "  ", "body": "2"}, {"text": "셋", "body": "3"}]
        path = write("a.jsonl", "\n\n".join(json.dumps(line) for line in lines))
        assert read(path) == ["하나", "셋"]
        assert read(path, field="body") == ["1", "2", "3"]

    def test_wrong_field(self, write: Write) -> None:
        path = write("a.jsonl", '{"title": "a", "body": "b"}')
        with pytest.raises(
            InputError, match=r"a.jsonl, line 1, has no field 'text'; it has 'title', 'body'; name another as"
        ):
            read(path)

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("{text}", r"a.jsonl, line 3, is not valid JSON \(.*\); correct it"),
            ('["a"]', r"a.jsonl, line 3, is not a JSON object; every line must be one, with the field 'text'"),
            ('{"text": 5}', r"a.jsonl, line 3: the field 'text' is int, not text"),
            ('{"text": []}', r"the field 'text' is list, not text; name another as calibration.field"),
            ('{"text": "\\ud800"}', r"half a surrogate pair"),
        ],
    )
    def test_bad_line(self, write: Write, line: str, message: str) -> None:
        texts = load_texts(str(write("a.jsonl", '{"text": "a"}\n\n' + line + "\n")))
        assert next(texts) == "a"
        with pytest.raises(InputError, match=message):
            next(texts)

    def test_rows_without_text_are_counted(self, write: Write) -> None:
        rows = [{"text": "a"}, {"text": None}, {"text": "b"}, {"text": None}]
        path = write("a.jsonl", "\n".join(json.dumps(row) for row in rows))
        empty = EmptyRows()
        assert list(load_texts(str(path), empty=empty)) == ["a", "b"]
        assert (empty.count, empty.first) == (2, f"{path}, line 2")
        assert read(path) == ["a", "b"]


class TestParquet:
    @pytest.fixture(autouse=True)
    def _needs_pyarrow(self, request: pytest.FixtureRequest) -> None:
        if "without" not in request.node.name:
            pytest.importorskip("pyarrow")

    @staticmethod
    def table(path: Path, **columns: Any) -> Path:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(columns), path)
        return path

    def test_columns(self, tmp_path: Path) -> None:
        path = self.table(tmp_path / "a.parquet", text=["a", "", "b"], body=["c", "d", "e"])
        assert read(path) == ["a", "b"]
        assert read(path, field="body") == ["c", "d", "e"]

    def test_wrong_column(self, tmp_path: Path) -> None:
        path = self.table(tmp_path / "a.parquet", title=["a"], body=["b"])
        with pytest.raises(
            InputError, match=r"a.parquet has no column 'text'; it has 'title', 'body'; name another as"
        ):
            read(path)

    @pytest.mark.parametrize("values", [[b"a", b"b"], [1, 2]])
    def test_not_text(self, tmp_path: Path, values: list[Any]) -> None:
        path = self.table(tmp_path / "a.parquet", text=values)
        with pytest.raises(InputError, match=r"a.parquet, row \d: the field 'text' is (bytes|int), not text"):
            read(path)

    def test_rows_without_text_are_counted(self, tmp_path: Path) -> None:
        path = self.table(tmp_path / "a.parquet", text=["a", None, "b"])
        empty = EmptyRows()
        assert list(load_texts(str(path), empty=empty)) == ["a", "b"]
        (note,) = empty.notes
        assert note == f"1 row has no text (null) and is left out of the calibration: {path}, row 2"

    def test_damaged(self, write: Write) -> None:
        with pytest.raises(InputError, match=r"a.parquet is not a readable parquet file"):
            read(write("a.parquet", b"PAR1 and nothing more"))

    def test_without_pyarrow(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(InputError, match=r"a.parquet needs the package pyarrow; install it with"):
            read(write("a.parquet", b""))


class TestPlaces:
    def test_folder(self, write: Write, tmp_path: Path) -> None:
        write("b.txt", "two")
        write("a.jsonl", '{"text": "one"}')
        write("c/d.txt", "three")
        write("LICENSE", "not this")
        assert read(tmp_path) == ["one", "two", "three"]

    def test_folder_without_text(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"has no calibration text; give files that end in \.txt, \.jsonl"):
            read(tmp_path)

    @pytest.mark.parametrize("name", ["nothing.txt", "nothing.jsonl", "./nothing", "/nowhere/at/all"])
    def test_missing(self, name: str) -> None:
        with pytest.raises(
            InputError, match=f"{name} does not exist; give a text file, a folder or the name of a data set"
        ):
            read(name)

    def test_unknown_kind(self, write: Write) -> None:
        with pytest.raises(InputError, match=r"a.docx has an unknown file type"):
            read(write("a.docx", "a"))

    def test_unreadable(self, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        path = write("a.txt", "a")

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("svdconvert.storage.documents.os.open", refuse)
        with pytest.raises(InputError, match=r"a.txt cannot be read \(Permission denied\)"):
            read(path)


class TestDataset:
    @staticmethod
    def fake(monkeypatch: pytest.MonkeyPatch, load: Callable[..., Any]) -> None:
        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))

    def test_rows(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Any] = []

        def load(*args: Any, **options: Any) -> list[dict[str, Any]]:
            asked.append((args, options))
            return [{"text": "a", "id": 1}, {"text": "b", "id": 2}]

        self.fake(monkeypatch, load)
        assert read("some/set") == ["a", "b"]
        assert asked == [(("some/set",), {"split": "train", "streaming": True})]
        with pytest.raises(InputError, match="the data set some/set has no field 'body'; it has 'text', 'id'"):
            read("some/set", field="body")
        with pytest.raises(InputError, match="the data set some/set, row 1: the field 'id' is int, not text"):
            read("some/set", field="id")

    def test_cannot_be_loaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load(*args: Any, **options: Any) -> Iterator[Any]:
            raise ConnectionError("Couldn't reach the Hub\nand a second line")

        self.fake(monkeypatch, load)
        message = (
            "some/set is neither a file nor a folder, and the data set of that name cannot be loaded (Couldn't reach "
            "the Hub)"
        )
        with pytest.raises(InputError, match=re.escape(message) + "$"):
            read("some/set")

    def test_offline(self) -> None:
        pytest.importorskip("datasets")
        with pytest.raises(
            InputError, match=r"^some-one/no-such-set is neither a file nor a folder, and the data set of that name"
        ):
            read("some-one/no-such-set")

    def test_without_datasets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(
            InputError, match="some/set is neither a file nor a folder, and data sets need the package datasets"
        ):
            read("some/set")


class _Opened:
    """A tokenizer that opens every text with a token, as LLaMA's and Gemma's do: every character is a token."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, text: str | list[str], add_special_tokens: bool = True, **_: object) -> dict[str, Any]:
        first = [self.bos_token_id] if add_special_tokens else []
        if isinstance(text, str):
            return {"input_ids": [*first, *[5] * len(text)]}
        return {"input_ids": [[*first, *[5] * len(one)] for one in text]}

    def get_vocab(self) -> dict[str, int]:
        return {"<s>": 1, "</s>": 2, "x": 5}


class TestPacked:
    def test_documents_are_joined(self, tokenizer: Any) -> None:
        texts = ["abc", "", "defgh", "i"]
        tokens = sample_tokens(texts, tokenizer, samples=100, length=4)
        stream = [
            token for text in texts if text for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
        ]
        assert tokenizer.eos_token_id == END
        assert tokens.ids.tolist() == [stream[0:4], stream[4:8], stream[8:12]]
        assert tokens.mask.all()
        assert (tokens.texts_used, tokens.tokens) == (4, 12)
        assert tokens.ids.dtype == torch.int64

    @given(
        lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30),
        length=st.integers(2, 12),
    )
    def test_every_sequence_begins_as_a_text_does(self, lengths: list[int], length: int) -> None:
        """With the token that the tokenizer opens texts with; without those put in, the stream is what it was."""
        opened = _Opened()
        documents = ["x" * n for n in lengths]
        stream = [token for n in lengths for token in [_Opened.bos_token_id, *[5] * n, _Opened.eos_token_id]]
        rows: list[list[int]] = []
        at = 0
        while True:  # the rule, token by token
            row = [] if stream[at : at + 1] == [_Opened.bos_token_id] else [_Opened.bos_token_id]
            taken = stream[at : at + length - len(row)]
            if len(row) + len(taken) < length:
                break
            rows.append(row + taken)
            at += len(taken)
        if not rows:
            with pytest.raises(InputError, match="too short"):
                sample_tokens(documents, opened, samples=1000, length=length)
            return
        found = sample_tokens(documents, opened, samples=1000, length=length).ids.tolist()
        assert found == rows[: POOL * 1000]
        assert all(row[0] == _Opened.bos_token_id for row in found)

    def test_choice(self, tokenizer: Any) -> None:
        texts = ["".join(chr(97 + i % 26) for i in range(start, start + 50)) for start in range(40)]

        def chosen(seed: int) -> CalibrationTokens:
            return sample_tokens(texts, tokenizer, samples=5, length=16, seed=seed)

        first, again, other = chosen(0), chosen(0), chosen(1)
        assert first.ids.shape == (5, 16)
        assert torch.equal(first.ids, again.ids)
        assert first.digest == again.digest
        assert not torch.equal(first.ids, other.ids)
        assert first.digest != other.digest
        assert first.text_digest == other.text_digest

    def test_a_large_text_is_not_read_to_its_end(self, tokenizer: Any) -> None:
        read_so_far = [0]

        def endless() -> Iterator[str]:
            while True:
                read_so_far[0] += 1
                yield "abcdefg"

        tokens = sample_tokens(endless(), tokenizer, samples=2, length=8)
        assert tokens.ids.shape == (2, 8)
        assert tokens.texts_used == read_so_far[0] <= 2 * POOL + 64

    @pytest.mark.parametrize(("texts", "documents", "count"), [([], 0, 0), (["", ""], 2, 0), (["abc", "d"], 2, 6)])
    def test_too_short(self, tokenizer: Any, texts: list[str], documents: int, count: int) -> None:
        with pytest.raises(
            InputError, match=f"too short: {documents} documents with {count} tokens, but at least 7 are needed"
        ):
            sample_tokens(texts, tokenizer, samples=1, length=7)

    @pytest.mark.parametrize(("samples", "length"), [(0, 8), (1, 1)])
    def test_impossible(self, tokenizer: Any, samples: int, length: int) -> None:
        with pytest.raises(InputError, match=f"samples={samples} and calibration.length={length} are too"):
            sample_tokens(["abc"], tokenizer, samples=samples, length=length)

    def test_text_that_tokenizes_to_nothing(self) -> None:
        class Mute:
            eos_token_id = END
            pad_token_id = None

            def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
                return {"input_ids": [[] for _ in texts]}

        with pytest.raises(InputError, match="1 documents with 0 tokens"):
            sample_tokens(["text"], Mute(), samples=1, length=4)


def test_digests(tokenizer: Any, dense: Path, tmp_path: Path) -> None:
    one = sample_tokens(["abcdef", "gh"], tokenizer, samples=1, length=4)
    two = sample_tokens(["abcde", "fgh"], tokenizer, samples=1, length=4)
    assert one.text_digest != two.text_digest
    assert one.tokenizer_digest == tokenizer_digest(load_tokenizer(dense)) == tokenizer_digest(tokenizer)
    changed = json.loads((dense / "tokenizer.json").read_text())
    changed["model"]["vocab"]["zz"] = len(changed["model"]["vocab"])
    for file in dense.iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    (tmp_path / "config.json").write_text((dense / "config.json").read_text())
    assert tokenizer_digest(load_tokenizer(tmp_path)) != one.tokenizer_digest


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)),
        (torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3)),
        (torch.zeros(3, dtype=torch.int64), torch.ones(3, dtype=torch.bool)),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[True, False, True]])),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[False, False, False]])),
    ],
)
def test_shapes(ids: torch.Tensor, mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \[N, length\]|padding must come last"):
        CalibrationTokens(ids, mask, 1, 1)

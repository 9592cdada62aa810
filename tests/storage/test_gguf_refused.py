"""GGUF files that cannot be read: one sentence for each fault, and nothing is allocated for what a file claims."""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svdconvert.errors import InputError
from svdconvert.storage import gguf_source
from svdconvert.storage.gguf_header import GgufHeader, read_gguf_header
from svdconvert.storage.opening import open_source

from support.gguf_files import tiny, write_gguf  # isort: skip
from support.refusals import assert_refused  # isort: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A sound file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny("llama", num_hidden_layers=1)).read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        open_source(str(path))
    return str(caught.value)


def at(text: bytes, offset: int, value: bytes) -> Callable[[bytes], bytes]:
    """Put bytes so far behind the end of the first place where a text stands."""

    def change(data: bytes) -> bytes:
        place = data.index(text) + len(text) + offset
        return data[:place] + value + data[place + len(value) :]

    return change


def replaced(text: bytes, other: bytes) -> Callable[[bytes], bytes]:
    assert len(text) == len(other)
    return lambda data: data.replace(text, other, 1)


HUGE = struct.pack("<Q", 2**60)
TENSOR = b"blk.0.ffn_up.weight"
# Behind a tensor's name: its dimensions' number (4), the dimensions (8 each), type (4), offset (8).
DAMAGED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "not a GGUF file"),
    "other magic": (lambda data: b"GGML" + data[4:], "not a GGUF file"),
    "a page instead": (lambda data: b"<html>not found</html>", "not a GGUF file"),
    "version 1": (lambda data: data[:4] + struct.pack("<I", 1) + data[8:], "version 1"),
    "other byte order": (lambda data: data[:4] + struct.pack(">I", 3) + data[8:], "other byte order"),
    "cut in the counts": (lambda data: data[:15], "room for"),
    "cut in the header": (lambda data: data[:2000], "truncated"),
    "cut in the data": (lambda data: data[:-100], "truncated or damaged: tensor"),
    "2**60 tensors": (lambda data: data[:8] + HUGE + data[16:], "claims"),
    "2**60 entries": (lambda data: data[:16] + HUGE + data[24:], "claims"),
    "a long key": (lambda data: data[:24] + HUGE + data[32:], "claims"),
    "a long vocabulary": (at(b"tokenizer.ggml.tokens", 8, HUGE), "more entries of tokenizer.ggml.tokens"),
    "a long list": (at(b"tokenizer.ggml.token_type", 8, HUGE), "more entries of tokenizer.ggml.token_type"),
    "a long text": (at(b"tokenizer.chat_template", 4, HUGE), "tokenizer.chat_template claims"),
    "no such type of value": (at(b"general.name", 0, struct.pack("<I", 99)), "general.name is of type 99"),
    "a key in two lines": (replaced(b"general.name", b"general\nname"), 'is damaged: "general\\nname" is no key'),
    "a key twice": (replaced(b"llama.context_length", b"llama.embedding_lengt"[:20]), "lacks llama.context_length"),
    "a tensor twice": (replaced(TENSOR, b"blk.0.attn_v.weight"), "blk.0.attn_v.weight is in it twice"),
    "a name that is a command": (
        replaced(TENSOR, b"blk.0.ffn\x1b[2Jweight"),
        "printed (blk.0.ffn\\x1b[2Jw",
    ),
    "2**60 rows": (at(TENSOR, 12, HUGE), "damaged: tensor blk.0.ffn_up.weight of type F32 has the shape"),
    "2**50 rows": (at(TENSOR, 12, struct.pack("<Q", 2**50)), "truncated or damaged: tensor"),
    "no rows": (at(TENSOR, 12, struct.pack("<Q", 0)), "has the shape [0, 64]"),
    "many dimensions": (at(TENSOR, 0, struct.pack("<I", 2**31)), "has 2147483648 dimensions"),
    "no dimensions": (at(TENSOR, 0, struct.pack("<I", 0)), "has 0 dimensions"),
    "unknown type": (at(TENSOR, 20, struct.pack("<I", 77)), "has GGML's type 77"),
    "half a block": (at(TENSOR, 20, struct.pack("<I", 12)), "of type Q4_K has the shape [128, 64]"),
    "a far offset": (at(TENSOR, 24, struct.pack("<Q", 2**63)), "truncated or damaged: tensor"),
    "a crooked offset": (at(TENSOR, 24, struct.pack("<Q", 33)), "not in a place of its own"),
    "another's place": (at(TENSOR, 24, struct.pack("<Q", 0)), "not in a place of its own"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged(case: str, whole: bytes, tmp_path: Path) -> None:
    change, words = DAMAGED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(change(whole))
    said = refusal(path)
    assert words in said
    assert str(path) in said
    assert "\n" not in said


def test_random_damage(whole: bytes, tmp_path: Path) -> None:
    """Whatever byte of the header is changed, the file is read or refused."""
    random_ = random.Random(0)
    path, end = tmp_path / "model.gguf", whole.index(b"output_norm.weight") + 60
    read = 0
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(random_.randrange(1, 4)):
            data[random_.randrange(end)] = random_.choice((0, 1, 0x7F, 0xFF, random_.randrange(256)))
        path.write_bytes(data)
        try:
            open_source(str(path))
            read += 1
        except InputError:
            pass
    assert 0 < read < 400


# Changes to the metadata, and what is said about them.
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "experts": ({"llama.expert_count": 8}, "llama.expert_count 8"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, 'rope.scaling.type "yarn"'),
    "part of a head": ({"llama.rope.dimension_count": 8}, "rope.dimension_count 8, but heads have 16 channels"),
    "other values": ({"llama.attention.value_length": 32}, "value_length 32, but heads have 16 channels"),
    "unknown": ({"llama.attention.clamp": 5}, "llama.attention.clamp 5, which its config.json could not say"),
    "missing": ({"llama.attention.head_count": None}, "lacks llama.attention.head_count"),
    "by layer": ({"llama.attention.head_count_kv": [2, 1]}, "not one number for all layers"),
    "text": ({"llama.block_count": "three"}, 'llama.block_count "three", not one number'),
    "a fraction": ({"llama.block_count": 1.5}, "llama.block_count 1.5, not one number"),
    "no heads": ({"llama.attention.head_count": 0}, "heads"),
    "odd heads": ({"llama.attention.head_count": 3}, "heads"),
    "alignment": ({"general.alignment": 33}, "general.alignment is 33"),
    "an adapter": ({"general.type": "adapter"}, "of the type 'adapter'"),
    "a vision model": ({"general.type": "mmproj"}, "of the type 'mmproj'"),
    "a part": ({"split.count": 3}, "a part of a model in 3 files"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings(case: str, tmp_path: Path) -> None:
    changes, words = SETTINGS[case]
    path = write_gguf(tmp_path / "model.gguf", tiny("llama", num_hidden_layers=1), changes=changes, tokenizer=False)
    assert words in refusal(path)


def test_other_tensors(tmp_path: Path) -> None:
    model = tiny("llama", num_hidden_layers=1)
    for name, shape in (("blk.0.ffn_gate_exps.weight", (2, 64, 64)), ("blk.0.attn_q.weight.x", (4, 4))):
        path = write_gguf(tmp_path / "model.gguf", model, extra={name: np.zeros(shape, np.float32)}, tokenizer=False)
        assert f"has the tensor {name}" in refusal(path)
    table = {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}
    path = write_gguf(tmp_path / "model.gguf", model, extra=table, tokenizer=False)
    assert "that is not LLaMA 3.1's" in refusal(path)


def test_architectures(run: Any, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole.replace(b"llama", b"bloom"))
    refused = run("plan", path, "--rank", 8)
    assert_refused(refused, path, 'of the architecture "bloom"', "gpt2, llama")


def test_without_the_package(run: Any, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for words in (("plan", path, "--rank", 8), (path, "--rank", 8, "--out", tmp_path / "out")):
        assert_refused(run(*words), path, "pip install 'svdconvert[gguf]'")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_transformers_cannot_read(run: Any, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny("llama"), changes={"tokenizer.ggml.model": "unheard of"})
    refused = run(path, "--rank", 8, "--device", "cpu", "--out", tmp_path / "out")
    assert_refused(refused, "cannot read the tokenizer of", path)


def test_several_models(run: Any, whole: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    for name in ("tiny-Q4_K_M.gguf", "tiny-Q8_0.gguf"):
        (folder / name).write_bytes(whole)
    refused = run("plan", folder, "--rank", 8)
    assert_refused(refused, "several GGUF models", folder / "tiny-Q4_K_M.gguf", folder / "tiny-Q8_0.gguf")


def test_parts_that_do_not_belong_together(tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("two", 1)):
        write_gguf(tmp_path / name / "model.gguf", tiny("llama", seed=seed), split_max_tensors=12)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    last = tmp_path / "one" / names[-1]
    kept = last.read_bytes()
    last.unlink()
    assert f"lacks {names[-1]}, a part of {names[0]}" in refusal(tmp_path / "one" / names[0])
    last.write_bytes((tmp_path / "one" / names[1]).read_bytes())
    assert f"{names[-1]} is not part {len(names)}" in refusal(tmp_path / "one")
    outside = tmp_path / "outside.gguf"
    outside.write_bytes(kept)
    last.unlink()
    last.symlink_to(outside)
    for place in (tmp_path / "one", tmp_path / "one" / names[0]):
        assert "is not followed" in refusal(place)


def test_a_card_from_elsewhere(whole: bytes, tmp_path: Path) -> None:
    folder, outside = tmp_path / "model", tmp_path / "outside.md"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(whole)
    outside.write_text("secret")
    (folder / "README.md").symlink_to(outside)
    assert "is not followed" in refusal(folder)


def test_no_such_file(run: Any, tmp_path: Path) -> None:
    for name in ("nowhere/model.gguf", "nowhere.gguf", "/nowhere/at/all/model.gguf"):
        assert_refused(run("plan", name, "--rank", 8), f"there is no file '{name}'; give a GGUF file")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "gone")
    assert_refused(run("plan", tmp_path / "model.gguf", "--rank", 8), tmp_path / "model.gguf")


def test_a_type_that_the_package_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, not in the middle of a job."""
    path = write_gguf(tmp_path / "model.gguf", tiny("llama", num_hidden_layers=1), kind="Q8_0")

    def unknown(data: Any, kind: Any) -> Any:
        raise NotImplementedError("Quantization for Q8_0 is not yet implemented")

    monkeypatch.setattr("gguf.dequantize", unknown)
    assert "weights of the type Q8_0, which the installed package gguf cannot multiply out" in refusal(path)


def test_cut_short_between_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its header is read, and then somebody writes the file anew, or removes it."""
    model = tiny("llama", num_hidden_layers=1)
    extra = {"rope_freqs.weight": np.ones(8, np.float32)}
    path = write_gguf(tmp_path / "model.gguf", model, extra=extra, tokenizer=False)
    whole = path.read_bytes()
    place = read_gguf_header(path).tensors["rope_freqs.weight"].start

    def then(change: Callable[[], object]) -> Callable[[Path], GgufHeader]:
        def read(path: Path) -> GgufHeader:
            found = read_gguf_header(path)
            change()
            return found

        return read

    for cut in (place, place + 5):
        path.write_bytes(whole)
        change = then(lambda cut=cut: path.write_bytes(whole[:cut]))  # type: ignore[misc]
        monkeypatch.setattr(gguf_source, "read_gguf_header", change)
        assert refusal(path) == f"{path} ends within its tensor rope_freqs.weight; fetch it again"
    path.write_bytes(whole)
    monkeypatch.setattr(gguf_source, "read_gguf_header", then(path.unlink))
    assert refusal(path) == f"{path} cannot be read (No such file or directory)"
    monkeypatch.undo()
    path.write_bytes(whole)
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        source.side_files  # noqa: B018

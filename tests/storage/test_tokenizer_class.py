"""A result's tokenizer splits a text as tokenizer.json says, though transformers 5 does not know its model type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import read_config, write_checkpoint
from support.refusals import edit_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from svdconvert import convert, densify
from svdconvert.models.tokenizer import load_tokenizer, opening_token
from svdconvert.storage.tokenizer_class import _QWEN2, named_class, read_whole

DIGITS = r"\p{N}{1,3}|[^\p{N}]+"
TEXTS = ("won 1200", "<|user|>no way", "1998 12", "서울 12")
SPLIT = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": DIGITS}}, {"type": "ByteLevel"}]}
QWEN = {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": _QWEN2}}, {"type": "ByteLevel"}]}
NFC, PREPEND = {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]}
SPACED = {"type": "Metaspace", "prepend_scheme": "first", "split": False}
OPENING = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]}


def by_bytes(own: bool = True) -> Tokenizer:
    """A tokenizer whose merges are used in another way when it splits as GPT-2's does."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    more = ["Ġw", "19", "199", "1998", "<|endoftext|>", "<|user|>"]
    letters = {sign: number for number, sign in enumerate([*signs, *more])}
    tokenizer = Tokenizer(models.BPE(letters, [("Ġ", "w"), ("1", "9"), ("19", "9"), ("199", "8")]))
    split = pre_tokenizers.Split(Regex(DIGITS), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain]) if own else plain
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def by_pieces(opened: bool = False) -> Tokenizer:
    """One that puts a space before every piece of text, as LLaMA's of transformers 4 do."""
    pieces = ["<unk>", "<s>", "</s>", "<|user|>", "▁", *"abcdefghijklmnopqrstuvwxyz0123456789", "▁n", "▁w"]
    letters = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(letters, [("▁", "n"), ("▁", "w")], unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken("<|user|>", normalized=False)])
    if opened:
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Path:
    source = write_checkpoint(folder)
    (source / "special_tokens_map.json").unlink()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    return source


def unspaced() -> Tokenizer:
    """One that puts no space before a text."""
    tokenizer = by_pieces()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


CASES = {
    "GPT-2": (by_bytes(), {"tokenizer_class": "GPT2Tokenizer"}),
    "LLaMA": (by_pieces(), {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": False}),
    "LLaMA, no space": (unspaced(), {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}),
    "LLaMA, opened": (by_pieces(opened=True), {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
}

ENDS = {"GPT-2": "<|endoftext|>", "LLaMA": "</s>", "LLaMA, no space": "</s>", "LLaMA, opened": "</s>"}


@pytest.mark.parametrize("case", CASES)
def test_a_result_splits_as_its_file_says(case: str, tmp_path: Path) -> None:
    tokenizer, settings = CASES[case]
    source = write(tmp_path / "source", tokenizer, **settings)
    convert(source, tmp_path / "out", rank=16, device="cpu")
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    for folder in (tmp_path / "out", tmp_path / "densified"):
        read = AutoTokenizer.from_pretrained(folder)
        assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
        assert (read.eos_token, set(read("a"))) == (ENDS[case], {"input_ids", "attention_mask"})
    assert read_config(tmp_path / "out")["model_type"] == "polyglot_svd"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["gpt_neox", "qwen2"])
def test_a_dense_model_is_calibrated_with_the_tokens_of_its_file(case: str, kind: str, tmp_path: Path) -> None:
    """transformers 5 reads it by its class, or by that of Qwen 2, whatever its file says."""
    tokenizer, settings = CASES[case]
    source = write(tmp_path / "source", tokenizer, **settings)
    edit_json(source / "config.json", model_type=kind)
    read = load_tokenizer(source)
    assert [read(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
    assert (read.eos_token, set(read("a"))) == (ENDS[case], {"input_ids", "attention_mask"})
    assert opening_token(read) == (1 if case == "LLaMA, opened" else None)


def test_a_dense_model_whose_file_is_read_whole(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    source = write(tmp_path / "source", by_bytes(), **settings)
    edit_json(source / "config.json", model_type="qwen2")
    read = load_tokenizer(source)
    assert [read(text)["input_ids"] for text in TEXTS] == [by_bytes().encode(text).ids for text in TEXTS]
    assert (read.eos_token, read.bos_token) == ("<|endoftext|>", None)


def test_a_class_that_makes_what_the_file_says_stays(tmp_path: Path) -> None:
    source = write(tmp_path / "source", by_bytes(own=False), tokenizer_class="GPT2Tokenizer")
    convert(source, tmp_path / "out", rank=16, device="cpu")
    name = "tokenizer_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "changed", "settings", "file"),
    [
        ("GPT2Tokenizer", True, {}, {"pre_tokenizer": SPLIT}),
        ("GPT2TokenizerFast", True, {}, {"normalizer": NFC, "pre_tokenizer": {"type": "ByteLevel"}}),
        ("GPT2Tokenizer", False, {}, {"normalizer": None, "pre_tokenizer": {"type": "ByteLevel"}}),
        ("Qwen2Tokenizer", False, {}, {"normalizer": NFC, "pre_tokenizer": QWEN}),
        ("Qwen2Tokenizer", True, {}, {"normalizer": None, "pre_tokenizer": QWEN}),
        ("Qwen2Tokenizer", True, {}, {"normalizer": NFC, "pre_tokenizer": SPLIT}),
        ("LlamaTokenizer", False, {}, {"pre_tokenizer": SPACED, "post_processor": OPENING}),
        ("LlamaTokenizer", True, {"legacy": True}, {"pre_tokenizer": SPACED, "post_processor": OPENING}),
        ("LlamaTokenizer", True, {"add_prefix_space": False}, {"pre_tokenizer": SPACED, "post_processor": OPENING}),
        ("LlamaTokenizer", True, {}, {"pre_tokenizer": {"type": "Metaspace"}, "post_processor": OPENING}),
        ("LlamaTokenizer", False, {}, {"pre_tokenizer": SPLIT, "post_processor": {"type": "ByteLevel"}}),
        ("LlamaTokenizer", True, {}, {"normalizer": PREPEND, "post_processor": OPENING}),
        ("LlamaTokenizer", True, {"add_bos_token": False}, {"normalizer": PREPEND}),
        # transformers 4 puts the class' token before a text, whatever the file says
        ("LlamaTokenizer", False, {"add_bos_token": True}, {"normalizer": PREPEND}),
        ("LlamaTokenizer", False, {"add_eos_token": True}, {"normalizer": PREPEND, "post_processor": OPENING}),
        ("GPT2Tokenizer", True, {}, {"normalizer": 3, "pre_tokenizer": ["damaged"]}),
    ],
)
def test_which_classes_are_replaced(name: str, changed: bool, settings: dict[str, Any], file: dict[str, Any]) -> None:
    found = read_whole(settings | {"tokenizer_class": name}, file, {})
    assert (found is not None) is changed
    assert found is None or found["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_the_files_say_is_kept() -> None:
    settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<eos>", "pad_token": None}
    settings |= {"model_input_names": ["ids"]}
    found = read_whole(settings, {"pre_tokenizer": SPLIT}, {"bos_token": "<bos>"})
    assert found == settings | {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<|endoftext|>"}


def test_a_map_of_special_tokens_that_transformers_does_not_read() -> None:
    """It reads none where tokenizer_config.json has the added tokens."""
    settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": {}}
    found = read_whole(settings, {"pre_tokenizer": SPLIT}, {"eos_token": "<eos>"})
    assert found is not None
    assert found["eos_token"] == "<|endoftext|>"


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "GemmaTokenizer", "", None, 3])
def test_others_are_left_alone(name: object) -> None:
    assert named_class({"tokenizer_class": name}) is None
    assert named_class({"tokenizer_class": "GPT2Tokenizer", "auto_map": {"AutoTokenizer": ["a.B", None]}}) is None

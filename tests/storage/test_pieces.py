"""A tokenizer of which there is the SentencePiece model alone splits as that does, and opens texts as it always did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from support.checkpoints import write_checkpoint
from support.refusals import edit_json
from transformers import AutoTokenizer

from svdconvert import convert
from svdconvert.models.tokenizer import load_tokenizer, opening_token

TEXTS = ("won 1200 times", "no  way\nnow", "서울 won")
MODEL = "tokenizer.model"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As those of LLaMA are: pairs merged, unknown letters as bytes, a space before a text."""
    folder = tmp_path_factory.mktemp("pieces")
    lines = (f"won no way now {number} times seoul" for number in range(50))
    SentencePieceTrainer.train(
        sentence_iterator=lines, model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=300,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return folder / MODEL


def write(folder: Path, pieces: Path, kind: str, settings: dict[str, Any]) -> Path:
    source = write_checkpoint(folder)
    for file in (*source.glob("tokenizer*"), source / "special_tokens_map.json"):
        file.unlink()
    (source / MODEL).write_bytes(pieces.read_bytes())
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_json(source / "config.json", model_type=kind)
    return source


@pytest.mark.parametrize("name", ["LlamaTokenizer", "CodeLlamaTokenizer"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "phi3"])
def test_a_dense_model_is_calibrated_with_its_tokens(kind: str, name: str, pieces: Path, tmp_path: Path) -> None:
    """transformers 5 gives these no opening token, and the latter two no space before a text."""
    source = write(tmp_path / "source", pieces, kind, {"tokenizer_class": name})
    read, reference = load_tokenizer(source), SentencePieceProcessor(str(pieces))
    assert [read(text)["input_ids"] for text in TEXTS] == [[1, *reference.encode(text)] for text in TEXTS]
    if name == "LlamaTokenizer":  # transformers 5 has the other one put no space behind a special token
        assert read("won</s>no")["input_ids"] == [1, *reference.encode("won"), 2, *reference.encode("no")]
    assert opening_token(read) == 1


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast"])
@pytest.mark.parametrize("opened", [None, True, False])
def test_a_result_opens_texts_as_its_source_did(name: str, opened: bool | None, pieces: Path, tmp_path: Path) -> None:
    settings = {"tokenizer_class": name, "eos_token": "</s>"} | ({} if opened is None else {"add_bos_token": opened})
    source = write(tmp_path / "source", pieces, "gpt_neox", settings)
    convert(source, tmp_path / "out", rank=16, device="cpu")
    read, reference = AutoTokenizer.from_pretrained(tmp_path / "out"), SentencePieceProcessor(str(pieces))
    first = [1] * (opened is not False)
    assert [read(text)["input_ids"] for text in TEXTS] == [first + reference.encode(text) for text in TEXTS]
    assert load_tokenizer(source)(TEXTS[0])["input_ids"] == read(TEXTS[0])["input_ids"]
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"add_bos_token": True, "legacy": True} | settings


def test_a_setting_that_is_null_is_as_one_that_is_left_out(pieces: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", pieces, "llama", {"tokenizer_class": "LlamaTokenizer", "legacy": None})
    reference = SentencePieceProcessor(str(pieces))
    wanted = [1, *reference.encode("won"), 2, *reference.encode("no")]
    assert load_tokenizer(source)("won</s>no")["input_ids"] == wanted


def test_gemmas_opens_them_too(pieces: Path, tmp_path: Path) -> None:
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    source = write(tmp_path / "source", pieces, "gpt_neox", settings)
    convert(source, tmp_path / "out", rank=16, device="cpu")
    read = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opening_token(read) == opening_token(load_tokenizer(source)) == read.bos_token_id


def test_other_classes_are_left_alone(pieces: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "source", pieces, "gpt_neox", {"tokenizer_class": "T5Tokenizer"})
    convert(source, tmp_path / "out", rank=16, device="cpu")
    name = "tokenizer_config.json"
    assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()

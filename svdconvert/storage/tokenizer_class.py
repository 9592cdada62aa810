"""The class that reads a tokenizer as ``tokenizer.json`` says.

The tokenizers of transformers 5 take the vocabulary from ``tokenizer.json`` and build the normaliser and the
pre-tokeniser themselves, unless the model type is in a table of theirs, for which the file is read whole. A factored
model has a type of its own, so the class in ``tokenizer_config.json`` would decide, and where the file says otherwise
than the class the same text would become other tokens. Then the class is replaced by the one that reads the file whole
in every version; what the class adds to the file is written down.

Where there is ``tokenizer.model`` alone, a SentencePiece model, transformers 5 opens no text with a token unless the
settings say so, and for some model types, Mistral's among them, takes another class than they name. Then the named
class reads it, and its settings get what they meant before when they said nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.storage.documents import json_or_none

SETTINGS = "tokenizer_config.json"
WHOLE = "PreTrainedTokenizerFast"
_INPUTS = ["input_ids", "attention_mask"]


@dataclass(frozen=True)
class _Class:
    """What a class makes, whatever the file says, and its defaults for what a file's settings leave out.

    Attributes:
        normalizer: kind of its normaliser; empty: none.
        splits: kinds of its pre-tokeniser, one of which a file has to have.
        expression: beginning of the expression that it splits by; empty: none.
        defaults: settings.
        first: whether the opening token is put before a text by default; None: as the file says.
    """

    normalizer: str
    splits: tuple[str, ...]
    expression: str = ""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    first: bool | None = None


_END = "<|endoftext|>"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CLASSES = {
    "GPT2Tokenizer": _Class("", ("ByteLevel",), defaults=dict.fromkeys(("unk_token", "bos_token", "eos_token"), _END)),
    "Qwen2Tokenizer": _Class(
        "NFC", ("Sequence",), _QWEN2, dict.fromkeys(("unk_token", "eos_token", "pad_token"), _END)
    ),
    "LlamaTokenizer": _Class(
        "",
        ("Metaspace", "ByteLevel"),
        defaults={"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "padding_side": "left"},
        first=True,
    ),
}
# What settings that leave it out have meant to classes that read a SentencePiece model.
_PIECES: Mapping[str, Mapping[str, Any]] = {
    "LlamaTokenizer": {"add_bos_token": True, "legacy": True},
    "CodeLlamaTokenizer": {"add_bos_token": True},
    "GemmaTokenizer": {"add_bos_token": True},
}


def whole_settings(find: Callable[[str], Path | None]) -> dict[str, Any] | None:
    """``tokenizer_config.json`` of a result, or None where the source's is right, missing or damaged.

    Args:
        find: name of a file -> its path, if it is there.
    """

    def read(name: str) -> dict[str, Any] | None:
        path = find(name)
        return None if path is None else json_or_none(path)

    if (settings := read(SETTINGS)) is None:
        return None
    if find("tokenizer.json") is None:
        return None if find("tokenizer.model") is None else piece_settings(settings)
    if named_class(settings) is None or (tokenizer := read("tokenizer.json")) is None:
        return None
    return read_whole(settings, tokenizer, read("special_tokens_map.json") or {})


def named_class(settings: Mapping[str, Any], known: Collection[str] = _CLASSES.keys()) -> str | None:
    """The class in ``tokenizer_config.json``, where it is a known one; by default: one that may have to be replaced."""
    name = settings.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else None
    return name if name in known and not settings.get("auto_map") else None


def piece_settings(settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """``tokenizer_config.json`` beside ``tokenizer.model`` alone, or None for a class of which nothing is known."""
    if (name := named_class(settings, _PIECES)) is None:
        return None
    # transformers 4 takes a `legacy` that is null for one that is left out, and writes it so
    said = {key: value for key, value in settings.items() if key != "legacy" or value is not None}
    return {**_PIECES[name], **said}


def read_whole(
    settings: Mapping[str, Any], tokenizer: Mapping[str, Any], special: Mapping[str, Any]
) -> dict[str, Any] | None:
    """``tokenizer_config.json`` of a result, or None where the source's is right.

    Args:
        settings: the source's, whose class is a :func:`named_class`.
        tokenizer: its ``tokenizer.json``.
        special: its ``special_tokens_map.json``.
    """
    row = _CLASSES[str(named_class(settings))]
    if _is_built(row, settings, tokenizer) or not _opens_as_written(row, settings, tokenizer):
        return None
    if "added_tokens_decoder" in settings:  # transformers reads no map of special tokens then
        special = {}
    defaults = {name: value for name, value in row.defaults.items() if name not in special}
    return {"model_input_names": _INPUTS, **defaults, **settings, "tokenizer_class": WHOLE}


def _is_built(row: _Class, settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """Whether the class makes the normaliser and the pre-tokeniser that the file has."""
    normalizer, split = _part(tokenizer, "normalizer"), _part(tokenizer, "pre_tokenizer")
    if normalizer.get("type", "") != row.normalizer or split.get("type") not in row.splits:
        return False
    if split.get("type") == "Metaspace" and not _starts_as_built(settings, split):
        return False
    first = _list(split, "pretokenizers")[:1]
    return not row.expression or [_part(part, "pattern").get("Regex") for part in first] == [row.expression]


def _starts_as_built(settings: Mapping[str, Any], split: Mapping[str, Any]) -> bool:
    """Whether the class puts a space before the pieces of a text that the file puts one before, and joins words."""
    before = "never"
    if settings.get("add_prefix_space") in (None, True):
        before = "always" if settings.get("legacy") else "first"
    written = split.get("prepend_scheme", "always" if split.get("add_prefix_space", True) else "never")
    return (written, split.get("split", True)) == (before, False)


def _opens_as_written(row: _Class, settings: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> bool:
    """Whether the tokens that the class puts around a text are those that the file puts there."""
    if row.first is None:
        return True
    marks = ["SpecialToken" in part for part in _list(_part(tokenizer, "post_processor"), "single")]
    asked = settings.get("add_bos_token", row.first), settings.get("add_eos_token", False)
    return (marks[:1] == [True], marks[-1:] == [True]) == (bool(asked[0]), bool(asked[1]))


def _part(value: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = value.get(name)
    return found if isinstance(found, Mapping) else {}


def _list(value: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = value.get(name)
    return [part for part in found if isinstance(part, Mapping)] if isinstance(found, list) else []

"""The tokenizer of a model folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.table import FACTORED
from svdconvert.families.towers import FACTORED_TOWERS
from svdconvert.foreign import foreign_code, quiet_transformers
from svdconvert.storage.documents import read_json
from svdconvert.storage.tokenizer_class import SETTINGS, WHOLE, whole_settings

# Files that hold a tokenizer's vocabulary, for any class of tokenizer.
_VOCABULARY = re.compile(r"(tokenizer|tekken)\.json|.*vocab.*\.\w+|.*\.(model|tiktoken|codes|tokenizer)|dict\.txt")
# Files that are read with it; refused by name if they are no JSON, or JSON that would crash a parser.
_TOKENIZER_DOCUMENTS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

OWN_TOKENIZER = "put the model's own in its place, or enlarge its embedding (resize_token_embeddings)"


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the vocabulary of a tokenizer."""
    return any(_VOCABULARY.fullmatch(path.name) and path.is_file() for path in folder.iterdir())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, which splits as its tokenizer.json says, where it has one.

    Raises:
        InputError: it has none; no other is used in its place.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    # transformers 5 makes up an empty tokenizer where there is none.
    if not has_tokenizer(folder):
        raise InputError(
            f"{folder} has no usable tokenizer (tokenizer.json, tokenizer.model, vocab.json or the like); "
            "copy the files of its tokenizer into it"
        )
    for name in _TOKENIZER_DOCUMENTS:
        if (folder / name).exists():
            read_json(folder / name, "")
    file = folder / "config.json"
    config = read_json(file, "") if file.is_file() else {}
    found = FACTORED.get(str(config.get("model_type")))
    if (tower := FACTORED_TOWERS.get(str(config.get("model_type")))) is not None:
        found = tower.text
    # Without a config, transformers 5 reads config.json as a generic one, which fails on some rotary scalings.
    options = {"config": AutoConfig.for_model(found.model_type)} if found else {}
    with (
        foreign_code(f"{folder} has no usable tokenizer", "install what it asks for, or fetch its files again"),
        quiet_transformers(),
    ):
        if (added := _read_whole(folder)) is not None:
            return PreTrainedTokenizerFast.from_pretrained(folder, **added)
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _read_whole(folder: Path) -> dict[str, Any] | None:
    """What to read tokenizer.json with, if transformers 5 might split otherwise than it says; None: it does not.

    It does by the class in the settings, and for some model types, Qwen 2 among them, by theirs in its place.
    """
    files = {name: folder / name for name in _TOKENIZER_DOCUMENTS if (folder / name).is_file()}
    stored = read_json(files[SETTINGS], "") if SETTINGS in files else {}
    if (whole := whole_settings(files.get)) is not None:
        return {name: value for name, value in whole.items() if name not in stored}
    plain = stored.get("tokenizer_class") == WHOLE and "tokenizer.json" in files and not stored.get("auto_map")
    return {} if plain else None


def opening_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text by default, as those of LLaMA, Gemma and OPT do."""
    first = getattr(tokenizer, "bos_token_id", None)
    return int(first) if first is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [first] else None

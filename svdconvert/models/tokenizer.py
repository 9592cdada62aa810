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
_SENTENCEPIECE = "tokenizer.model"

OWN_TOKENIZER = "put the model's own in its place, or enlarge its embedding (resize_token_embeddings)"


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder has the vocabulary of a tokenizer."""
    return any(_VOCABULARY.fullmatch(path.name) and path.is_file() for path in folder.iterdir())


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, which splits as its tokenizer.json says, where it has one.

    Raises:
        InputError: it has none; no other is used in its place.
    """
    import transformers

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
    options = {"config": transformers.AutoConfig.for_model(found.model_type)} if found else {}
    with (
        foreign_code(f"{folder} has no usable tokenizer", "install what it asks for, or fetch its files again"),
        quiet_transformers(),
    ):
        if (written := _written(folder)) is not None:
            kind, added = written
            return getattr(transformers, kind).from_pretrained(folder, **added)
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)


def _written(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Class that splits as the files say, and what to read them with, if transformers 5 might not; None: it does.

    It goes by the class in the settings, and for some model types, Qwen 2 and Mistral among them, by theirs in its
    place.
    """
    files = {name: folder / name for name in (*_TOKENIZER_DOCUMENTS, _SENTENCEPIECE) if (folder / name).is_file()}
    stored = read_json(files[SETTINGS], "") if SETTINGS in files else {}
    if (settings := whole_settings(files.get)) is not None:
        kind = str(settings["tokenizer_class"]).removesuffix("Fast")
        return f"{kind}Fast", {name: value for name, value in settings.items() if stored.get(name) is None}
    plain = stored.get("tokenizer_class") == WHOLE and "tokenizer.json" in files and not stored.get("auto_map")
    return (WHOLE, {}) if plain else None


def opening_token(tokenizer: Any) -> int | None:
    """The token that a tokenizer puts before every text by default, as those of LLaMA, Gemma and OPT do."""
    first = getattr(tokenizer, "bos_token_id", None)
    return int(first) if first is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [first] else None

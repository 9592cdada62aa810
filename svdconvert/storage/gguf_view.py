"""A GGUF model as a folder: its config.json, and generation_config.json and tokenizer as transformers makes them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.foreign import foreign_code, quiet_transformers
from svdconvert.machine.interrupts import lasting_folder, temporary_folder
from svdconvert.storage.documents import reading

_VIEWS: dict[tuple[object, ...], Path] = {}

# What transformers writes of where a tokenizer was and of itself, which would differ from run to run.
_PASSING = ("name_or_path", "is_local", "local_files_only", "transformers_version")


_ORIGINAL = "update transformers, or convert the checkpoint that the file was made from"


def gguf_view(files: Sequence[Path], config: Mapping[str, Any], where: str, *, tokenizer: bool) -> Path:
    """The folder of a model; the same one as long as the files are the same.

    Args:
        files: the file, or all parts in order.
        config: what config.json is to say.
        where: the model, for messages.
        tokenizer: whether there is one in the file.

    Raises:
        InputError: a file is gone, or the installed transformers cannot read the config or the tokenizer.
    """
    key = tuple(_state(path) for path in files)
    if key not in _VIEWS:
        folder = lasting_folder()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        _save_generation(folder, where)
        if tokenizer:
            _save_tokenizer(files[0], folder, where)
        _VIEWS[key] = folder
    return _VIEWS[key]


def _state(path: Path) -> tuple[object, ...]:
    with reading(path):
        status = path.stat()
    return str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns


def _save_generation(folder: Path, where: str) -> None:
    """Write how text is generated: what transformers takes from a config where no file says it."""
    import transformers

    with foreign_code(f"the settings of {where} cannot be used by transformers", _ORIGINAL), quiet_transformers():
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        transformers.GenerationConfig.from_model_config(config).save_pretrained(folder)
    _settle(folder / "generation_config.json")


def _save_tokenizer(file: Path, folder: Path, where: str) -> None:
    """Write the tokenizer that transformers makes of a file."""
    import transformers

    problem = f"transformers {transformers.__version__} cannot read the tokenizer of {where}"
    # alone in a folder: what lies beside it is not of this file
    with temporary_folder() as alone, foreign_code(problem, _ORIGINAL), quiet_transformers():
        (alone / file.name).symlink_to(file.resolve())
        made = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=file.name, trust_remote_code=False)
        made.save_pretrained(folder)
    _settle(folder / "tokenizer_config.json")


def _settle(file: Path) -> None:
    """Take out of a document what would differ from run to run."""
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        kept = {name: value for name, value in said.items() if name not in _PASSING}
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

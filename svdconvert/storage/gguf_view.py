"""A GGUF model as a folder: its config.json, and its tokenizer as transformers makes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.foreign import foreign_code, quiet_transformers
from svdconvert.machine.interrupts import lasting_folder, temporary_folder

_VIEWS: dict[tuple[object, ...], Path] = {}

# What transformers writes of where a tokenizer was, which would differ from run to run.
_PASSING = ("name_or_path", "is_local", "local_files_only")


def gguf_view(files: Sequence[Path], config: Mapping[str, Any], where: str, *, tokenizer: bool) -> Path:
    """The folder of a model; the same one as long as the files are the same.

    Args:
        files: the file, or all parts in order.
        config: what config.json is to say.
        where: the model, for messages.
        tokenizer: whether there is one in the file.

    Raises:
        InputError: the installed transformers cannot read the tokenizer.
    """
    status = [path.stat() for path in files]
    key = tuple(
        (str(path.resolve()), s.st_ino, s.st_size, s.st_mtime_ns) for path, s in zip(files, status, strict=True)
    )
    if key not in _VIEWS:
        folder = lasting_folder()
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        if tokenizer:
            _save_tokenizer(files[0], folder, where)
        _VIEWS[key] = folder
    return _VIEWS[key]


def _save_tokenizer(file: Path, folder: Path, where: str) -> None:
    """Write the tokenizer that transformers makes of a file."""
    import transformers

    problem = f"transformers {transformers.__version__} cannot read the tokenizer of {where}"
    # alone in a folder: what lies beside it is not of this file
    with temporary_folder() as alone, foreign_code(problem), quiet_transformers():
        (alone / file.name).symlink_to(file.resolve())
        made = transformers.AutoTokenizer.from_pretrained(alone, gguf_file=file.name, trust_remote_code=False)
        made.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        said = json.loads(settings.read_text(encoding="utf-8"))
        kept = {name: value for name, value in said.items() if name not in _PASSING}
        settings.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

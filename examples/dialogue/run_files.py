"""The files of a run's folder: its settings, and what may be continued."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError

CHECKPOINTS, SETTINGS_FILE = "checkpoints", "settings.json"


def refuse_other_settings(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to continue a run under other settings.

    Raises:
        InputError: a setting has changed; the message names it.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged; delete {folder} or give another --output") from None
    for section, values in wanted.items():
        old = before.get(section, {})
        for key, value in values.items():
            if old.get(key) != value:
                raise InputError(
                    f"{folder} holds a run with {section}.{key} = {old.get(key)!r}, not {value!r}; delete the folder "
                    "or give another --output"
                )


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint that was written whole; the Trainer writes its state file last."""
    whole = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def write_json(path: Path, content: Any) -> None:
    """Write a file so that its name never shows half of it."""
    partial = path.with_name(path.name + ".writing")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)

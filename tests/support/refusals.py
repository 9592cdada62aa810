"""How a user's mistake is answered."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers  # noqa: F401 - its loggers keep the stderr of their import, which must not be that of one test


def assert_refused(result: SimpleNamespace, *words: object, code: int = 2, usage: bool = False) -> None:
    """Exit code and exactly one sentence that says what is wrong; a wrong option's own value comes with the usage."""
    assert "Traceback" not in result.out + result.err
    lines = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.err
    if not usage:
        assert result.err == lines[0] + "\n"
    assert result.code == code, result.err
    for word in words:
        assert str(word) in lines[0], (word, lines[0])


def edit_json(path: Path, **changes: Any) -> None:
    value = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))

"""A text to measure on and its windows: what can be refused of them before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.table import longest_input
from svdconvert.sentences import asked
from svdconvert.settings.row import whole
from svdconvert.storage import documents

# Protocol -> tokens of a window by default, or as many as the model reads if those are fewer.
PROTOCOLS: Mapping[str, int] = {"sliding": 1024, "disjoint": 2048}

# The whole text is in memory; no test set is larger.
MAX_TEXT_BYTES = 1_000_000_000


def windows(config: Mapping[str, Any], window: int | None, stride: int | None, protocol: str) -> tuple[int, int]:
    """``(window, stride)`` in tokens.

    Args:
        config, window, stride, protocol: see :func:`svdconvert.models.passages.read_passage`.

    Raises:
        InputError: the window, the stride or the protocol cannot be used.
    """
    if protocol not in PROTOCOLS:
        raise InputError(f"{asked('protocol', protocol)} is unknown; choose {' or '.join(PROTOCOLS)}")
    usual = PROTOCOLS[protocol]
    longest = longest_input(config, usual)
    window = min(usual, longest) if window is None else whole("window", window)
    if not 2 <= window <= longest:
        raise InputError(f"{asked('window', window)} is not possible; the model reads from 2 to {longest} tokens")
    if protocol == "disjoint":
        if stride not in (None, window):
            raise InputError(
                f"{asked('stride')} does not go with {asked('protocol', 'disjoint')}, whose windows do not overlap; "
                "leave it out"
            )
        return window, window
    stride = max(window // 2, 1) if stride is None else whole("stride", stride)
    if not 1 <= stride < window:
        raise InputError(
            f"{asked('stride', stride)} must lie between 1 and {window - 1}, below the window; for windows that do not "
            f"overlap use {asked('protocol', 'disjoint')}"
        )
    return window, stride


def read_text(path: Path) -> str:
    """A UTF-8 text file with something in it.

    Raises:
        InputError: it cannot be read, is empty, or holds records rather than text.
    """
    if path.suffix in (".jsonl", ".parquet"):
        raise InputError(f"{path} would be measured with its field names as text; write its texts into a .txt file")
    content = documents.read_text(path, f"{path} cannot be read (No such file or directory)", MAX_TEXT_BYTES)
    if not content.strip():
        raise InputError(f"{path} is empty; give a text with content")
    return content

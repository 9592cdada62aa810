"""The pages of the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for name in ("docs", "examples", "findings") for page in (ROOT / name).rglob("*.md"))]
)

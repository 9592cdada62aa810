"""`evaluate` costs what the plain loop costs, and finds the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdconvert.models.windows import PROTOCOLS

from .evaluating import compare
from .harness import BUNDLED


@pytest.mark.slow
def test_evaluate_is_as_fast_as_a_plain_loop(tmp_path: Path) -> None:
    """CPU seconds, the least of some rounds, in turn; the same perplexity to six digits."""
    text = tmp_path / "text.txt"
    text.write_text((BUNDLED / "heldout.txt").read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    found = compare(BUNDLED / "model", text, window=256, repeats=4)
    assert found.keys() == PROTOCOLS.keys()
    for protocol, one in found.items():
        assert one["perplexity"] == pytest.approx(one["plain_perplexity"], rel=1e-6)
        assert one["ratio"] < 1.15, protocol

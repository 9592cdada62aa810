"""Memory must depend on the largest matrix alone, not on the number of layers or the size of a weight file."""

from __future__ import annotations

from pathlib import Path

import pytest

from .memory import ONE_FILE, SMALL_FILE, peak

# Two runs of the same conversion differ by a few MB: the allocator, how far the reader got ahead.
NOISE = 20_000_000


@pytest.mark.slow
def test_memory_does_not_grow_with_layers_or_files(tmp_path: Path) -> None:
    """Twelve more layers are 75 MB to read and 28 MB to write; four are enough to fill every buffer."""
    runs = {
        (layers, limit): peak(tmp_path, hidden=512, layers=layers, source_bytes=limit, output_bytes=limit, vocab=4096)
        for layers, limit in ((4, ONE_FILE), (16, ONE_FILE), (16, SMALL_FILE))
    }
    few, many, sharded = (run["peak_bytes"] for run in runs.values())
    assert runs[16, ONE_FILE]["source_files"] == 1
    assert runs[16, SMALL_FILE]["source_files"] > 4
    assert abs(many - few) < NOISE
    assert abs(many - sharded) < NOISE

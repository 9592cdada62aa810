"""What a saved checkpoint must be."""

from __future__ import annotations

from pathlib import Path

import torch
from support.checkpoints import read_config, read_weights

from svdconvert.families.row import Architecture
from svdconvert.jobs.model_files import modeling_source


def assert_sound(folder: Path, row: Architecture, source: Path) -> None:
    """The folder is a checkpoint as the converter writes it, of the same numbers."""
    assert (folder / f"{row.modeling}.py").read_bytes() == modeling_source(row)
    config, before = read_config(folder), read_config(source)
    assert config["auto_map"] == row.auto_map
    for key in ("model_type", "svd_ranks", "svd_layout", "tie_word_embeddings"):
        assert config.get(key, True) == before[key]
    assert row.config_overrides(config) == row.config_overrides(before)
    assert {key: config.get(key) for key in row.config_overrides(before)} == row.config_overrides(before)
    saved, expected = read_weights(folder), read_weights(source)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)

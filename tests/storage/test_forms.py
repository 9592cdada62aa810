"""The same model in the forms in which real ones come: what lies beside the weights, one file or many, tied or not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import GENERATION, pickle_weights
from support.families import full_ranks, write_family
from transformers import AutoModelForCausalLM

from svdconvert import convert, densify, evaluate, verify
from svdconvert.commands.verify import failed
from svdconvert.families.table import ARCHITECTURES

IDS = torch.arange(16)[None]


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


# family, tied, largest shard, pickled, generation_config.json
FORMS = [
    ("llama", True, "5GB", False, None),
    ("llama", False, "100kB", True, b""),
    ("llama", True, "100kB", False, b"\x89PNG\xff\xfe"),
    ("gpt2", True, "100kB", True, None),
    ("gpt2", False, "5GB", False, b"{"),
    ("gpt_neox", False, "100kB", False, None),
    ("gpt_neox", True, "5GB", True, GENERATION),
    ("opt", True, "5GB", False, b"{}"),
    ("gemma2", True, "100kB", True, None),
]


@pytest.mark.parametrize(("family", "tied", "limit", "pickled", "generation"), FORMS)
def test_every_form_is_converted(
    family: str, tied: bool, limit: str, pickled: bool, generation: bytes | None, text: Path, tmp_path: Path
) -> None:
    """At full rank it computes what the stock class does, as does what is multiplied out of it; nothing is left."""
    source = write_family(tmp_path / "source", family, max_shard_size=limit, generation=False, tie_word_embeddings=tied)
    if pickled:
        pickle_weights(source)
    if generation is not None:
        (source / "generation_config.json").write_bytes(generation)
    expected = logits(source)
    ranks = full_ranks(ARCHITECTURES[family], source)
    report = convert(source, tmp_path / "out", rank=ranks, factor_all=True, device="cpu")
    assert any("loaded whole" in check for check in report.outcome.checks)
    assert not failed(verify(tmp_path / "out", str(source)))
    densify(tmp_path / "out", tmp_path / "densified", device="cpu")
    for folder in (tmp_path / "out", tmp_path / "densified"):
        assert float((logits(folder) - expected).abs().max()) < 1e-3 * float(expected.abs().max())
        assert evaluate(folder, text, window=16, device="cpu").tokens > 0
        if generation is not None:
            assert (folder / "generation_config.json").read_bytes() == generation

"""Rotary settings in the spellings of transformers 4 and 5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_config
from support.families import (
    VERSION,
    VOCAB,
    full_ranks,
    rewrite_config,
    write_family,
)
from support.family_contract import assert_sound
from support.running import distance, load, logits
from torch import nn
from transformers import (
    AutoModelForCausalLM,
)

from svdconvert import InputError, convert, densify
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.factoring.measured import measure_losses
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES, dense_architecture
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource


def test_rotary_spellings(row: Architecture, checkpoints: Any, tmp_path: Path) -> None:
    """Either spelling alone is understood; two that differ are refused."""
    import shutil

    pair = checkpoints.pair(row.model_type)
    both = row.config_overrides(read_config(pair.factored))
    both = {key: value for key, value in both.items() if not key.startswith(("num_", "layer_"))}
    if "rope_parameters" not in both:
        pytest.skip("no rotary positions")
    expected = logits(pair.model)
    folder = Path(shutil.copytree(pair.factored, tmp_path / "spelled"))
    v4 = {key: None for key in both if key != "rope_parameters"}
    for missing in ({"rope_parameters": None}, v4):
        rewrite_config(folder, **(both | missing))
        assert distance(logits(load(folder)), expected) == 0
    name = "rotary_emb_base" if "rotary_emb_base" in both else "rope_theta"
    rewrite_config(folder, **(both | {name: 77.0}))
    with pytest.raises(ValueError, match=f"{name}=77.0, but"):
        load(folder)


LINEAR, DEFAULT = {"type": "linear", "factor": 2.0}, {"rope_type": "default"}


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": DEFAULT}, 'rope_type "linear" in rope_scaling'),
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 4.0}}, "factor 2.0 in rope_scaling"),
        ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_theta": 1e6}}, "rope_type"),
        (
            "llama",
            {"rope_theta": 77.0, "rope_parameters": DEFAULT | {"rope_theta": 1e4}},
            "rope_theta 77.0, but 10000.0",
        ),
        (
            "phi",
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 1.0}},
            "partial_rotary_factor 0.5, but 1.0",
        ),
        ("gpt_neox", {"rotary_emb_base": 77, "rope_parameters": DEFAULT | {"rope_theta": 1e4}}, "rotary_emb_base 77"),
    ],
)
def test_two_spellings_that_differ(family: str, settings: dict[str, Any], words: str) -> None:
    """transformers 5 takes rope_scaling in the place of all of rope_parameters, and 4 does not know the latter."""
    with pytest.raises(InputError, match=f"config.json of it says {words}.* in rope_parameters, .*; remove the wrong"):
        dense_architecture({"model_type": family, "vocab_size": 160} | settings, "it")


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e4}},
        {"rope_scaling": LINEAR, "rope_parameters": None},
        {"rope_scaling": None, "rope_theta": None, "rope_parameters": DEFAULT | {"rope_theta": 1e4}},
        {"rope_theta": 77.0, "rope_parameters": DEFAULT},
        {"rope_scaling": DEFAULT, "rope_theta": 77, "rope_parameters": {"rope_theta": 77.0}},
        {"rope_theta": 77.0, "rope_parameters": {"full_attention": DEFAULT | {"rope_theta": 1e4}}},
    ],
)
def test_two_spellings_that_agree(settings: dict[str, Any]) -> None:
    dense_architecture({"model_type": "llama", "vocab_size": 160} | settings, "it")


def longrope(channels: int) -> dict[str, Any]:
    """Scaling of so many rotary channels."""
    short, long = ([scale + 0.1 * n for n in range(channels // 2)] for scale in (1.0, 2.0))
    return {"type": "longrope", "short_factor": short, "long_factor": long}


# Heads have 16 channels.
PHI3: dict[str, dict[str, Any]] = {
    "longrope": {"rope_scaling": longrope(16)},
    "partial": {"rope_scaling": None, "partial_rotary_factor": 0.75},
    "partial longrope": {"rope_scaling": longrope(12), "partial_rotary_factor": 0.75},
}


@pytest.mark.parametrize("spelling", ["saved", "published", "su"])
@pytest.mark.parametrize("kind", PHI3)
def test_rotary_settings_of_phi3(kind: str, spelling: str, tmp_path: Path) -> None:
    """Full rank against the stock model, on both sides of the length from which on the long factors count, and across.

    As this version of transformers saves the config, as the models were published ("partial longrope" is Phi-4 mini),
    and with the name that longrope had in the first ones.
    """
    if spelling == "su" and "longrope" not in kind:
        pytest.skip("no scaling")
    if kind == "partial longrope" and VERSION < (5,):
        pytest.skip("4.46 wants a factor for every channel")
    dense = write_family(tmp_path / "dense", "phi3", **PHI3[kind])
    row, ranks = ARCHITECTURES["phi3"], full_ranks(ARCHITECTURES["phi3"], dense)
    stock = AutoModelForCausalLM.from_pretrained(dense).eval()
    if spelling != "saved":
        fields: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | PHI3[kind]
        if spelling == "su":
            fields["rope_scaling"] = fields["rope_scaling"] | {"type": "su"}
        rewrite_config(dense, rope_parameters=None, **fields)
    convert(dense, tmp_path / "made", rank=ranks, factor_all=True, device="cpu")
    model = load(tmp_path / "made")
    ids = torch.randint(4, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
    for length in (20, 40):
        assert distance(logits(model, ids[:, :length]), logits(stock, ids[:, :length])) < 1e-4
    if "longrope" in kind:
        start = logits(model, ids[:, :20])
        assert distance(start, logits(model, ids)[:, :20]) > 0.01, "the long factors are not used"
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    prompt = {"input_ids": ids[:, :28], "attention_mask": torch.ones(2, 28, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(model.generate(**prompt, **options), stock.generate(**prompt, **options))
    tokens = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), 3, ids.numel())
    loss, _ = measure_losses(
        LocalSource(dense), tokens, lambda index: {}, work=tmp_path / "w", device="cpu", batch_size=2, events=Events()
    )
    expected = nn.functional.cross_entropy(logits(stock, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="sum")
    assert loss.nll == pytest.approx(float(expected), rel=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert_sound(tmp_path / "again", row, tmp_path / "made")
    densify(tmp_path / "made", tmp_path / "densified", device="cpu")
    product = AutoModelForCausalLM.from_pretrained(tmp_path / "densified").eval()
    assert distance(logits(product, ids), logits(stock, ids)) < 1e-4

"""Every family, converted: the same logits at full rank, the same products wherever they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from support.checkpoints import read_config, read_weights
from support.families import (
    VOCAB,
    full_ranks,
    write_family,
)
from support.family_contract import assert_sound
from support.pairs import Pair
from support.representatives import EACH_ONCE, UNLIKE
from support.running import MASK, TOKENS, by_block, distance, load, logits
from transformers import (
    AutoModelForCausalLM,
)

from svdconvert import convert, densify, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.factoring.measured import measure_losses
from svdconvert.families.row import Architecture
from svdconvert.names import layer_number
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource


def test_full_rank_equals_the_stock_model(row: Architecture, dense: Path, tmp_path: Path) -> None:
    ranks = full_ranks(row, dense)
    report = convert(dense, tmp_path / "out", rank=ranks, factor_all=True, device="cpu")
    assert max(report.errors) < 1e-5
    model, stock = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense).eval()
    assert type(model).__name__ == row.causal_class
    assert set(model.config.svd_ranks) == set(ranks)
    assert distance(logits(model), logits(stock)) < 1e-4
    ours, theirs = logits(model, mask=MASK.long()), logits(stock, mask=MASK.long())
    assert distance(ours[MASK], theirs[MASK]) < 1e-4


@EACH_ONCE
def test_densified_equals_factored(row: Architecture, dense: Path, pair: Pair) -> None:
    """The stock class takes the result whole, and the numbers do not change; rank 0.6 is a real change."""
    stock, info = AutoModelForCausalLM.from_pretrained(pair.densified, output_loading_info=True)
    assert not any(info.values())
    assert type(stock).__name__ == row.dense_class
    expected = logits(stock.eval())
    assert distance(logits(pair.model), expected) < 1e-4
    assert distance(logits(AutoModelForCausalLM.from_pretrained(dense).eval()), expected) > 0.05
    assert read_weights(pair.densified).keys() == read_weights(dense).keys()
    assert not list(pair.densified.glob("*.py"))
    # what llama.cpp's converter asks of config.json and of no other field
    config, asked = read_config(pair.densified), {"gpt_neox": "rotary_pct", "gpt2": "n_ctx", "phi3": "rope_parameters"}
    assert asked.get(row.model_type, "model_type") in config
    if row.model_type == "gpt2":
        assert config["n_ctx"] == config["n_positions"]


@UNLIKE
def test_verify(dense: Path, pair: Pair) -> None:
    assert not failed(verify(pair.factored, str(dense)))


@UNLIKE
def test_layers_that_share_a_factor(row: Architecture, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "shared", keep=0.6, share_layers=2, device="cpu")
    densify(tmp_path / "shared", tmp_path / "densified", device="cpu")
    model, stock = load(tmp_path / "shared"), load(tmp_path / "densified")
    paths = set(full_ranks(row, dense))
    followers = {path.replace(".0.", ".1.", 1) for path in paths if layer_number(path) == 0}
    # the second block's, and where the first one has no such layer, as of experts, the third one's with the second's
    others = {path.replace(".1.", ".2.", 1) for path in paths if layer_number(path) == 1} - {
        path.replace(".1.", ".2.", 1) for path in followers
    }
    assert set(model.config.svd_shared) == (followers | others) & paths
    assert distance(logits(model), logits(stock)) < 1e-4
    assert distance(logits(model), by_block(tmp_path / "shared")) < 1e-5
    assert not failed(verify(tmp_path / "shared", str(dense)))
    model.save_pretrained(tmp_path / "again")
    assert_sound(tmp_path / "again", row, tmp_path / "shared")
    assert distance(logits(load(tmp_path / "again")), logits(model)) == 0


@EACH_ONCE
def test_embedding_is_stored_once(row: Architecture, pair: Pair) -> None:
    names = read_weights(pair.factored).keys()
    assert ("lm_head.weight" in names) != row.tied
    model = pair.model
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == row.tied


@UNLIKE
def test_other_forms_of_the_source(row: Architecture, dense: Path, checkpoints: Any, tmp_path: Path) -> None:
    """Shards that cut through layers, names without the base model's prefix, and a tied head stored all the same."""
    source = write_family(tmp_path / "shards", row.model_type, max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    from safetensors.torch import save_file

    tensors = read_weights(dense)
    (bare := tmp_path / "bare").mkdir()
    stored = {name.removeprefix(row.prefix): tensor.clone() for name, tensor in tensors.items()}
    if row.tied:
        stored[row.head[0]] = next(tensor.clone() for name, tensor in tensors.items() if tensor.shape[0] == VOCAB)
    save_file(stored, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_bytes((dense / "config.json").read_bytes())
    kinds = [name for name in row.targets if "o_proj" not in name]
    expected = read_weights(checkpoints.pair(row.model_type).factored)
    for folder in (source, bare):
        report = convert(folder, tmp_path / "out", keep=0.6, targets=kinds, device="cpu", overwrite=True, check=False)
        found = read_weights(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert report.plan.params_before == sum(tensor.numel() for tensor in tensors.values())
    assert any("stored once" in note for note in report.plan.notes) == row.tied
    assert not failed(verify(tmp_path / "out", str(bare)))
    one, two = (
        measure_losses(
            LocalSource(folder),
            TOKENS,
            lambda index: {},
            work=tmp_path / "w",
            device="cpu",
            batch_size=3,
            events=Events(),
        )
        for folder in (dense, bare)
    )
    assert one == two


def test_plan_needs_the_config_only(row: Architecture, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    one, two = plan(dense, keep=0.5), plan(tmp_path, keep=0.5)
    assert (one.params_before, one.params_after, one.ranks) == (two.params_before, two.params_after, two.ranks)

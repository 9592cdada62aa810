"""The trial run of a mixture: one expert in memory at a time, none of them unseen, and the same logits."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import read_weights
from support.families import FAMILIES

from svdconvert import convert, plan, verify
from svdconvert.commands.verify import failed
from svdconvert.errors import InputError
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.loading import load_model
from svdconvert.models.probe import PROBE, logits_by_block
from svdconvert.storage.source import LocalSource

IDS = torch.arange(PROBE)[None]
MIXTURES = [name for name in ("mixtral", "qwen3_moe", "gpt_oss", "granitemoehybrid") if name in FAMILIES]
SHARED: dict[str, Any] = {"share_layers": 2}


def change(folder: Path, name: str, value: float | None) -> None:
    """Overwrite a row of a tensor, or leave the tensor out."""
    tensors = read_weights(folder)
    if value is None:
        del tensors[name]
    else:
        tensors[name][1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("how", [{}, SHARED, {"share_experts": True}], ids=["own", "shared", "shared by experts"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_the_same_logits(model_type: str, how: dict[str, Any], checkpoints: Any, tmp_path: Path) -> None:
    """Those of the whole model, of the dense one and of factors, also where other blocks lend them."""
    dense = checkpoints.dense(model_type)
    convert(dense, tmp_path / "out", keep=0.6, device="cpu", check=False, **how)
    for folder in (tmp_path / "out",) if how else (dense, tmp_path / "out"):
        with torch.no_grad():
            whole = load_model(folder, "cpu", torch.float32)(input_ids=IDS).logits
        for wanted in (True, False):  # with gradients, experts without a token are called, too
            with torch.set_grad_enabled(wanted):
                found = torch.cat(list(logits_by_block(LocalSource(folder), IDS)), -1)
            assert float((found - whole).abs().max()) < 1e-4 * float(whole.abs().max())


@pytest.mark.parametrize("how", [{}, {"share_experts": True}], ids=["own", "shared by experts"])
def test_one_expert_at_a_time(how: dict[str, Any], checkpoints: Any, tmp_path: Path) -> None:
    """While one is run there are its weights and what several use; afterwards none."""
    convert(checkpoints.dense("mixtral"), tmp_path / "out", keep=0.6, device="cpu", check=False, **how)
    blocks = ModelBlocks(LocalSource(tmp_path / "out"))
    layer = blocks._layers[1]
    experts = layer.get_submodule("block_sparse_moe.experts")
    ran: list[int] = []

    def there() -> dict[str, int]:
        return {name: p.numel() for name, p in layer.named_parameters() if not p.is_meta}

    def look(number: int, inner: torch.nn.Module) -> None:
        def seen(module: torch.nn.Module, args: Any) -> None:
            ran.append(number)
            present = {name.split(".")[2] for name in there() if ".experts." in name and ".w2." in name}
            assert present == {str(number)}

        inner.register_forward_pre_hook(seen)

    for number, expert in enumerate(experts):
        look(number, expert.get_submodule("w2"))
    hidden, mask = torch.randn(1, PROBE, blocks.hidden_size), torch.ones(1, PROBE, dtype=torch.bool)
    with blocks.block(1):
        whole = there()
    with blocks.block(1, by_expert=True) as block, torch.no_grad():
        lent = {name for name in there() if ".experts." in name}
        blocks.run(block, hidden, mask)
        assert not any(".w2." in name for name in there())
    assert ran
    assert (lent == {f"block_sparse_moe.experts.0.{name}.down.weight" for name in ("w1", "w3")}) == bool(how)
    assert len(whole) > len(lent)
    assert not there()
    assert not any("forward" in vars(expert) for expert in experts)


@pytest.mark.parametrize("value", [math.nan, None])
def test_an_expert_without_a_token(value: float | None, checkpoints: Any, tmp_path: Path) -> None:
    """What is wrong with it is found, though no token comes by."""
    folder = Path(shutil.copytree(checkpoints.pair("mixtral").factored, tmp_path / "copy"))
    source = LocalSource(folder)
    blocks, one = ModelBlocks(source), torch.ones(1, 1, dtype=torch.bool)
    with torch.no_grad():
        hidden = blocks.embed(torch.zeros(1, 1, dtype=torch.int64), one)
    with blocks.block(0) as block, blocks.routing(block) as routing, torch.no_grad():
        blocks.run(block, hidden, one)
        unseen = next(n for n in range(4) if not len(routing.tokens(f"block_sparse_moe.experts.{n}.w1")))
    name = f"model.layers.0.block_sparse_moe.experts.{unseen}.w2.up.weight"
    change(folder, name, value)
    with pytest.raises(InputError, match=name), torch.no_grad():
        list(logits_by_block(LocalSource(folder), torch.zeros(1, 1, dtype=torch.int64)))
    assert failed(verify(folder))


def test_the_plan_counts_one_expert(checkpoints: Any) -> None:
    """Of the largest block, all that is no expert, and the largest expert of it."""
    made = plan(checkpoints.dense("mixtral"), keep=0.6)
    sizes = {info.name: info.size for infos in made.shards.values() for info in infos}
    most = 0
    for layer in range(3):
        own = {name: size for name, size in sizes.items() if name.startswith(f"model.layers.{layer}.")}
        experts = [sum(s for name, s in own.items() if f".experts.{number}." in name) for number in range(4)]
        most = max(most, sum(own.values()) - sum(experts) + max(experts))
    assert made._held_in_check() == most

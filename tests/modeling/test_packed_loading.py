"""Packed weights loaded by stock transformers with compressed-tensors: the numbers that our own arithmetic gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.packed import as_floats, mixed, pack_folder
from support.tiny_factored import DTYPE, TARGETS, VERSION, distance, full_ranks, load, logits, write_checkpoint

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.skipif(VERSION < (4, 57), reason="compressed-tensors 0.18 needs a newer transformers")

F32 = {DTYPE: torch.float32}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, layout: str) -> SimpleNamespace:
    """A packed checkpoint of several widths, and the same in float32."""
    place = tmp_path_factory.mktemp("packed")
    tiny = write_checkpoint(place / "tiny-svd", full_ranks(layout), layout)
    values = pack_folder(tiny.path, place / "packed", mixed)
    return SimpleNamespace(packed=place / "packed", floats=as_floats(place / "packed", values, place / "floats"))


@pytest.fixture(scope="module")
def expected(pair: SimpleNamespace, ids: torch.Tensor) -> torch.Tensor:
    return logits(load(pair.floats, **F32), ids)


def test_logits(pair: SimpleNamespace, ids: torch.Tensor, expected: torch.Tensor) -> None:
    model, info = load(pair.packed, output_loading_info=True, **F32)
    assert not any(info.values())
    plain = load(pair.floats, **F32)
    layer, other = (m.gpt_neox.layers[1].mlp.dense_h_to_4h for m in (model, plain))
    assert distance(layer.product(), other.product()) == 0
    assert distance(model.gpt_neox(ids).last_hidden_state, plain.gpt_neox(ids).last_hidden_state) == 0
    assert distance(logits(model, ids), expected) == 0
    assert distance(logits(model.for_decoding(), ids), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_packed(pair: SimpleNamespace, ids: torch.Tensor, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(pair.packed, **{DTYPE: dtype})
    before = logits(model, ids)
    model.save_pretrained(tmp_path / "again")
    assert distance(logits(model, ids), before) == 0
    again, info = load(tmp_path / "again", output_loading_info=True, **{DTYPE: dtype})
    assert not any(info.values())
    assert distance(logits(again, ids), before) == 0
    with torch.no_grad():
        model.gpt_neox.layers[1].mlp.dense_h_to_4h.up.weight.mul_(1.01)  # on no grid any more
    changed = logits(model, ids)
    model.save_pretrained(tmp_path / "changed")
    assert distance(logits(load(tmp_path / "changed", **{DTYPE: dtype}), ids), changed) == 0


@pytest.mark.skipif(VERSION < (5, 23), reason="it had another name")
def test_dequantised(pair: SimpleNamespace, ids: torch.Tensor, expected: torch.Tensor, tmp_path: Path) -> None:
    """Each layer by its own width."""
    from transformers import CompressedTensorsConfig

    model = load(pair.packed, quantization_config=CompressedTensorsConfig(dequantize=True), **F32)
    assert distance(logits(model, ids), expected) == 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()
    assert distance(logits(load(tmp_path, **F32), ids), expected) == 0


def test_lora_trains_beside(pair: SimpleNamespace, ids: torch.Tensor, expected: torch.Tensor, tmp_path: Path) -> None:
    model = get_peft_model(load(pair.packed, **F32), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    assert distance(logits(model, ids), expected) == 0
    trained = [parameter for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(pair.packed, **F32), tmp_path)
    assert distance(logits(again, ids), logits(model, ids)) == 0


def test_older_packing_is_refused(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.17.0")
    with pytest.raises(ImportError, match=r"packs otherwise since 0\.18, and 0\.17\.0 is installed"):
        load(pair.packed, **F32)

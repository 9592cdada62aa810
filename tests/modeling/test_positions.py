"""`position` of a pivoted layer: a permutation, or the model is refused, whichever way it came there."""

import shutil

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_factored import DTYPE, PIVOTED, load, logits
from torch import nn

QKV = "layers.0.attention.query_key_value"
KEY = f"gpt_neox.{QKV}.position"
MESSAGE = f"{QKV}.position is no permutation of 0 to 191"
OFFLOADED = {"gpt_neox": "disk", "lm_head": "cpu"}

pytestmark = PIVOTED


def averaged(position):
    """As tools that merge models make a mean of all tensors of two conversions."""
    return (position + position.roll(1)) // 2


@pytest.mark.parametrize("change", [averaged, lambda p: p + 1, lambda p: torch.full_like(p, -1)])
@pytest.mark.parametrize("options", [{}, {"device_map": OFFLOADED}, {"low_cpu_mem_usage": True}])
def test_refused_by_from_pretrained(tiny, tmp_path, change, options):
    folder = shutil.copytree(tiny.path, tmp_path / "edited")
    tensors = {**tiny.tensors, KEY: change(tiny.tensors[KEY])}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if "device_map" in options:
        options = {**options, "offload_folder": str(tmp_path / "offload")}
    with pytest.raises(ValueError, match=MESSAGE):
        load(folder, **options)


def test_refused_at_the_first_use(tiny, ids):
    """After load_state_dict, or an engine that loads parameters only."""
    model = load(tiny.path)
    model.load_state_dict({**tiny.tensors, KEY: averaged(tiny.tensors[KEY])})
    with pytest.raises(ValueError, match=MESSAGE):
        model(ids)
    model.load_state_dict(tiny.tensors)
    assert torch.equal(logits(model, ids), logits(load(tiny.path), ids))


def test_looked_at_once(tiny, ids, monkeypatch):
    """Looking waits for the device."""
    model = load(tiny.path)
    layers = [layer for layer in model.modules() if hasattr(layer, "position")]
    looks = []
    monkeypatch.setattr(type(layers[0]), "check", lambda layer, position: looks.append(layer))
    logits(model, ids)
    assert not looks
    model.load_state_dict(tiny.tensors)
    with torch.no_grad():
        torch.compile(model, backend="eager", fullgraph=True)(ids)
    assert not looks
    logits(model, ids)
    assert len(looks) == len(layers) == 8


def test_stay_integers_when_offloaded(tiny, tmp_path):
    """transformers 4 offloads in the dtype of the weights, and bfloat16 has no 257."""
    model = load(tiny.path, device_map=OFFLOADED, offload_folder=str(tmp_path), **{DTYPE: torch.bfloat16})
    layer = model.gpt_neox.get_submodule(QKV)
    assert isinstance(layer, nn.Linear)
    assert not torch.equal(layer.position.cpu() if not layer.position.is_meta else torch.zeros(1), tiny.tensors[KEY])
    stored = layer._hf_hook.weights_map["position"]
    assert stored.dtype == torch.int64
    assert torch.equal(stored, tiny.tensors[KEY])

"""What trains under each settings file on the real geometry, counted on the meta device; parallel LoRA's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from examples.dialogue.full_size import SIZES, VOCABULARY, WAYS, standing_memory
from examples.dialogue.memory import count_memory
from examples.dialogue.models import adapt, load_causal
from examples.dialogue.settings import AdapterSettings, Settings, read_settings

ROOT = Path(__file__).parents[2]
FILES = ROOT / "examples" / "dialogue" / "settings"
LAYERS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")


def polyglot(size: str, rank: int):
    from svdconvert.modeling import modeling_polyglot_svd as modeling

    hidden, layers, heads, rotary = SIZES[size]
    geometry = {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "rotary_pct": rotary,
    }
    with torch.device("meta"):
        if not rank:
            return GPTNeoXForCausalLM(GPTNeoXConfig(**geometry))
        ranks = {f"layers.{n}.{name}": rank for n in range(layers) for name in LAYERS}
        model = modeling.PolyglotSVDForCausalLM(modeling.PolyglotSVDConfig(**geometry, svd_ranks=ranks))
        modeling._make_adaptable(model)  # loading does it, and nothing is loaded here
        return model


@pytest.mark.parametrize(
    ("file", "size", "trainable", "total"),
    [
        ("1.3b", "1.3B", 1_331_810_304, 1_331_810_304),
        ("1.3b-s", "1.3B", 526_503_936, 526_503_936),
        ("1.3b-p-s", "1.3B", 526_503_936, 526_503_936),
        ("1.3b-p-fs", "1.3B", 526_503_936, 526_503_936),
        ("3.8b-s", "3.8B", 1_394_055_168, 1_394_055_168),
        ("1.3b-s-l", "1.3B", 25_165_824, 551_669_760),
        ("3.8b-s-l", "3.8B", 50_331_648, 1_444_386_816),
        ("1.3b-l", "1.3B", 25_165_824, 1_331_810_304 + 25_165_824),
    ],
)
def test_counts_on_the_real_geometry(file, size, trainable, total):
    settings = read_settings(FILES / f"{file}.toml")
    with torch.device("meta"):  # peft makes its matrices where torch does by default
        model = adapt(polyglot(size, settings.convert.rank), settings, "")
    counted = count_memory(model)
    assert (counted.trainable, counted.parameters) == (trainable, total)


def test_the_lora_control_on_llama_7b():
    """Rank 1 on q, k, v, o: 32 layers x 4 x 2 x 4096."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
        adapter = AdapterSettings(kind="lora", rank=1, alpha=1.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
        adapted = adapt(model, Settings("a", "o", adapter=adapter), "")
    assert count_memory(adapted).trainable == 1_048_576


def test_adaption_prompt_of_peft():
    """One gate a layer: 30 x (10 x 4096 + 1)."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    adapter = AdapterSettings(kind="adaption-prompt", length=10, layers=30)
    adapted = adapt(model, Settings("a", "o", adapter=adapter), "")
    assert count_memory(adapted).trainable == 1_228_830


@pytest.mark.parametrize("model", ["dense", "factored"])
def test_lora_is_parallel_to_the_whole_layer(model, request):
    """h = (B A) x + bias + alpha / r * LB (LA x) in float64, on a layer of the model; W in place of B A if dense."""
    base = load_causal(request.getfixturevalue(model), torch.device("cpu"))
    adapter = AdapterSettings(kind="lora", rank=4, alpha=6.0, dropout=0.0)
    adapted = adapt(base, Settings("a", "o", adapter=adapter), "").double().eval()
    layer = adapted.base_model.model.gpt_neox.layers[1].mlp.dense_h_to_4h
    la, lb = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(lb)
    inner = layer.base_layer
    weight = inner.up.weight @ inner.down.weight if model == "factored" else inner.weight
    x = torch.randn(3, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = x @ weight.T + inner.bias + 6.0 / 4 * (x @ la.T) @ lb.T
        assert (layer(x) - expected).abs().max() < 1e-12
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)


def test_standing_memory_at_full_size():
    """16 bytes a trained parameter; 12.8B in 16 bits is 25.8 GB, in nf4 with float32 head and embeddings a third."""
    ways = {way.name: way for way in WAYS}
    assert standing_memory("1.3B", ways["all weights"]).standing == 16 * 1_331_810_304
    assert standing_memory("1.3B", ways["all weights, factored (-S)"]).standing == 16 * 526_503_936
    lora, qlora = (standing_memory("12.8B", ways[name]) for name in ("LoRA", "QLoRA"))
    trainable = 40 * 32 * (4 + 2 + 10) * 5120
    assert lora.trainable == qlora.trainable == trainable
    assert lora.weights == 2 * 12_893_603_840 + 4 * trainable
    linear = 40 * 12 * 5120 * 5120
    nf4 = linear / 2 + linear / 64 + 4 * linear / (64 * 256)
    assert qlora.weights == pytest.approx(nf4 + 4 * (12_893_603_840 - linear) + 4 * trainable, rel=1e-9)

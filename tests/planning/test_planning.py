"""Plans: counts from config and headers alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support.checkpoints import CONFIG, TARGETS, legacy_buffers, random_tensors, read_weights

from svdconvert import InputError, plan
from svdconvert.layouts.table import LAYOUTS
from svdconvert.names import layer_number, natural, suffix
from svdconvert.planning.steps import index_json
from svdconvert.planning.target_kinds import sizes_by_kind
from svdconvert.words import parse_size

POLYGLOT = {
    # name: (hidden, layers, heads, rotary_pct, parameters on the model card or by its files)
    "1.3b": (2048, 24, 16, 0.5, 1_331_810_304),
    "3.8b": (3072, 32, 24, 0.5, 3_809_974_272),
    "5.8b": (4096, 28, 16, 0.25, 5_885_059_072),
    "12.8b": (5120, 40, 40, 0.5, 12_893_603_840),
}


def polyglot(folder: Path, name: str) -> Path:
    hidden, layers, heads, rotary, _ = POLYGLOT[name]
    geometry = {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "rotary_pct": rotary,
        "vocab_size": 30080,
        "max_position_embeddings": 2048,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(dict(CONFIG) | geometry))
    return folder


@pytest.mark.parametrize(("name", "rank", "after"), [("1.3b", 512, 526_503_936), ("3.8b", 768, 1_394_055_168)])
def test_published_sizes(tmp_path: Path, name: str, rank: int, after: int) -> None:
    made = plan(polyglot(tmp_path / name, name), rank=rank)
    assert made.params_before == POLYGLOT[name][4]
    assert made.params_after == after
    assert made.bytes_after == pytest.approx(2 * after, rel=1e-3)
    assert made.training_bytes == (16 * POLYGLOT[name][4], 16 * after)


@pytest.mark.parametrize("name", POLYGLOT)
def test_dense_sizes_of_the_family(tmp_path: Path, name: str) -> None:
    assert plan(polyglot(tmp_path / name, name), rank=64).params_before == POLYGLOT[name][4]


def decoder(hidden: int, inner: int, layers: int, heads: int, vocab: int, **fields: object) -> dict[str, object]:
    """Geometry under the names that most families give it."""
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        **fields,
    }


# Published models with the parameters that their cards and files say, embeddings shared with the head counted once.
PUBLISHED = {
    "llama-1-7b": ("llama", decoder(4096, 11008, 32, 32, 32000), 6_738_415_616),
    "llama-3.1-8b": ("llama", decoder(4096, 14336, 32, 32, 128256, num_key_value_heads=8), 8_030_261_248),
    "llama-3-70b": ("llama", decoder(8192, 28672, 80, 64, 128256, num_key_value_heads=8), 70_553_706_496),
    "mistral-7b": ("mistral", decoder(4096, 14336, 32, 32, 32000, num_key_value_heads=8), 7_241_732_096),
    "qwen2.5-7b": ("qwen2", decoder(3584, 18944, 28, 28, 152064, num_key_value_heads=4), 7_615_616_512),
    "qwen3-8b": ("qwen3", decoder(4096, 12288, 36, 32, 151936, num_key_value_heads=8, head_dim=128), 8_190_735_360),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        decoder(
            2048,
            6144,
            48,
            32,
            151936,
            num_key_value_heads=4,
            head_dim=128,
            num_experts=128,
            moe_intermediate_size=768,
        ),
        30_532_122_624,
    ),
    "mixtral-8x7b": (
        "mixtral",
        decoder(4096, 14336, 32, 32, 32000, num_key_value_heads=8, num_local_experts=8),
        46_702_792_704,
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        decoder(2880, 2880, 24, 64, 201088, num_key_value_heads=8, head_dim=64, num_local_experts=32),
        20_914_757_184,
    ),
    "gpt-oss-120b": (
        "gpt_oss",
        decoder(2880, 2880, 36, 64, 201088, num_key_value_heads=8, head_dim=64, num_local_experts=128),
        116_829_156_672,
    ),
    "granite-4.0-h-tiny": (
        "granitemoehybrid",
        decoder(
            1536,
            512,
            40,
            12,
            100352,
            num_key_value_heads=4,
            shared_intermediate_size=1024,
            num_local_experts=64,
            num_experts_per_tok=6,
            mamba_n_heads=48,
            mamba_d_state=128,
            mamba_n_groups=1,
            mamba_d_conv=4,
            layer_types=["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
            tie_word_embeddings=True,
        ),
        6_939_037_248,
    ),
    "olmoe-1b-7b": ("olmoe", decoder(2048, 1024, 16, 16, 50304, num_experts=64), 6_919_161_856),
    "gemma-2-9b": ("gemma2", decoder(3584, 14336, 42, 16, 256000, num_key_value_heads=8, head_dim=256), 9_241_705_984),
    "gemma-3-270m": (
        "gemma3_text",
        decoder(640, 2048, 18, 4, 262144, num_key_value_heads=1, head_dim=256),
        268_098_176,
    ),
    "gemma-7b": ("gemma", decoder(3072, 24576, 28, 16, 256000, num_key_value_heads=16, head_dim=256), 8_537_680_896),
    "phi-2": ("phi", decoder(2560, 10240, 32, 32, 51200), 2_779_683_840),
    "stablelm-2-1.6b": ("stablelm", decoder(2048, 5632, 24, 32, 100352, use_qkv_bias=True), 1_644_515_328),
    "smollm3-3b": ("smollm3", decoder(2048, 11008, 36, 16, 128256, num_key_value_heads=4), 3_075_098_624),
    "olmo-2-7b": ("olmo2", decoder(4096, 11008, 32, 32, 100352), 7_298_617_344),
    "olmo-3-7b": ("olmo3", decoder(4096, 11008, 32, 32, 100278), 7_298_011_136),
    "command-r-35b": ("cohere", decoder(8192, 22528, 40, 64, 256000), 34_980_831_232),
    "glm-4-9b": ("glm", decoder(4096, 13696, 40, 32, 151552, num_key_value_heads=2, head_dim=128), 9_399_951_360),
    "glm-4-9b-0414": ("glm4", decoder(4096, 13696, 40, 32, 151552, num_key_value_heads=2, head_dim=128), 9_400_279_040),
    "seed-oss-36b": (
        "seed_oss",
        decoder(5120, 27648, 64, 80, 155136, num_key_value_heads=8, head_dim=128),
        36_151_104_512,
    ),
    "ernie-4.5-0.3b": (
        "ernie4_5",
        decoder(1024, 3072, 18, 16, 103424, num_key_value_heads=2, head_dim=128),
        360_748_032,
    ),
    "exaone-4-1.2b": (
        "exaone4",
        decoder(2048, 4096, 30, 32, 102400, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
        1_279_391_488,
    ),
    "phi-3-mini": ("phi3", decoder(3072, 8192, 32, 32, 32064, num_key_value_heads=32), 3_821_079_552),
    "opt-6.7b": ("opt", decoder(4096, 0, 32, 32, 50272, ffn_dim=16384), 6_658_473_984),
    "opt-350m": (
        "opt",
        decoder(1024, 0, 24, 16, 50272, ffn_dim=4096, word_embed_proj_dim=512, do_layer_norm_before=False),
        331_196_416,
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "olmo-7b": ("olmo", decoder(4096, 11008, 32, 32, 50304), 6_888_095_744),
    "apertus-8b": ("apertus", decoder(4096, 21504, 32, 32, 131072, num_key_value_heads=8), 8_053_338_240),
    "hunyuan-7b": (
        "hunyuan_v1_dense",
        decoder(4096, 14336, 32, 32, 128167, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
        7_504_568_320,  # its card says 7.5 billion
    ),
    "ministral-8b": (
        "ministral",
        decoder(4096, 12288, 36, 32, 131072, num_key_value_heads=8, head_dim=128),
        8_019_808_256,
    ),
    "ministral-3-8b": (
        "ministral3",
        decoder(4096, 14336, 34, 32, 131072, num_key_value_heads=8, head_dim=128),
        8_489_553_920,  # its card says 8.4 billion
    ),
    "kogpt-6b": (
        "gptj",
        {"n_embd": 4096, "n_layer": 28, "n_head": 16, "n_positions": 2048, "vocab_size": 64512, "rotary_dim": 64},
        6_166_502_400,
    ),
    "gpt-neo-1.3b": (
        "gpt_neo",
        {"hidden_size": 2048, "num_layers": 24, "num_heads": 16, "max_position_embeddings": 2048, "vocab_size": 50257},
        1_315_575_808,
    ),
    "bloom-560m": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}, 559_214_592),
    "bloom-7b1": (
        "bloom",
        {"n_embed": 4096, "n_layer": 30, "num_attention_heads": 32, "vocab_size": 250880},
        7_069_016_064,
    ),
    "falcon-7b": (
        "falcon",
        {"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024},
        6_921_720_704,
    ),
    "falcon-40b": (
        "falcon",
        {
            "hidden_size": 8192,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "num_kv_heads": 8,
            "new_decoder_architecture": True,
            "vocab_size": 65024,
        },
        41_303_293_952,
    ),
    "mpt-7b": ("mpt", {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}, 6_649_286_656),
    "starcoderbase": (
        "gpt_bigcode",
        {"n_embd": 6144, "n_layer": 40, "n_head": 48, "n_positions": 8192, "n_inner": 24576, "vocab_size": 49152},
        15_517_456_384,
    ),
    "granite-3.1-8b": (
        "granite",
        decoder(4096, 12800, 40, 32, 49155, num_key_value_heads=8, tie_word_embeddings=True),
        8_170_848_256,
    ),
    "starcoder2-3b": ("starcoder2", decoder(3072, 12288, 30, 24, 49152, num_key_value_heads=2), 3_030_371_328),
    "pythia-12b": ("gpt_neox", decoder(5120, 20480, 36, 40, 50688), 11_846_072_320),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models(tmp_path: Path, name: str) -> None:
    model_type, config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "torch_dtype": "bfloat16", **config}))
    assert plan(tmp_path, rank=64).params_before == parameters


def test_rank_above_what_keys_and_values_have(tmp_path: Path) -> None:
    """LLaMA-3-70B: 1024 x 8192, with a break-even rank of 910.2; never clamped in silence."""
    model_type, config, _ = PUBLISHED["llama-3-70b"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, **config}))
    for rank, reason in (
        (900, ""),
        (911, "rank 911 saves nothing (break-even 910.2)"),
        (2048, "rank 2048 is more than they have (break-even 910.2)"),
    ):
        made = plan(tmp_path, rank=rank)
        small = {"self_attn.k_proj", "self_attn.v_proj"}
        factored = {suffix(module) for module in made.ranks}
        assert len(factored) == (5 if reason else 7)
        assert {group.name for group in made.groups if group.ranks is None} == (small if reason else set())
        assert all(made.ranks[module] == rank for module in made.ranks)
        assert [note for note in made.notes if "stay dense" in note and reason in note] if reason else True
    with pytest.raises(InputError, match=r"rank 2048 is larger than layers\.0\.self_attn\.k_proj allows"):
        plan(tmp_path, rank={"*": 2048, "k_proj": 2048})


def test_plan_of_weights_equals_the_plan_of_the_config(fresh: Callable[..., Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    weights = fresh(shards=3, legacy=True)
    (bare / "config.json").write_bytes((weights / "config.json").read_bytes())
    one, two = plan(weights, rank=16), plan(bare, rank=16)
    assert one.params_before == two.params_before == sum(t.numel() for t in random_tensors().values())
    assert one.params_after == two.params_after
    assert one.ranks == two.ranks
    assert "config.json alone" in " ".join(two.notes)


def test_counts_are_those_of_the_result(dense: Path, factored: Path) -> None:
    made = plan(dense, rank=16)
    tensors = read_weights(factored)
    assert made.params_after == sum(tensor.numel() for tensor in tensors.values())
    assert made.bytes_after == sum(file.stat().st_size for file in factored.glob("*.safetensors"))
    assert list(made.ranks) == TARGETS


def test_legacy_buffers_are_dropped_and_said(fresh: Callable[..., Path]) -> None:
    made = plan(fresh(legacy=True), rank=16)
    assert f"{len(legacy_buffers())} legacy buffers" in " ".join(made.notes)
    names = {info.name for infos in made.shards.values() for info in infos}
    assert not any("masked_bias" in name or "inv_freq" in name for name in names)
    assert not any(name.endswith("attention.bias") for name in names)


def test_dense_targets_are_said(dense: Path) -> None:
    made = plan(dense, rank=40)
    assert {suffix(module) for module in made.ranks} == {
        "attention.query_key_value",
        "mlp.dense_h_to_4h",
        "mlp.dense_4h_to_h",
    }
    assert "rank 40 saves nothing (break-even 32.0)" in " ".join(made.notes)
    assert len(plan(dense, rank=40, factor_all=True).ranks) == len(TARGETS)


def test_one_target_is_no_plural(dense: Path) -> None:
    notes = " ".join(plan(dense, rank=40, targets=["layers.0.mlp.dense_h_to_4h", "layers.1.attention.dense"]).notes)
    assert "1 target stays dense, rank 40 saves nothing" in notes, notes


def test_targets(dense: Path) -> None:
    made = plan(dense, rank=8, targets=["layers.1.*", "dense_h_to_4h"])
    assert set(made.ranks) == {t for t in TARGETS if t.startswith("layers.1.") or t.endswith("dense_h_to_4h")}


@pytest.mark.parametrize("limit", [20_000, 60_000, 1_000_000])
def test_shards(dense: Path, limit: int) -> None:
    made = plan(dense, rank=16, max_shard_size=limit)
    names = [info.name for infos in made.shards.values() for info in infos]
    assert len(names) == len(set(names))
    for infos in made.shards.values():
        assert sum(info.nbytes for info in infos) <= limit or len(infos) == 1
    index = index_json(made.shards)
    if len(made.shards) == 1:
        assert list(made.shards) == ["model.safetensors"]
        assert index is None
    else:
        assert next(iter(made.shards)) == f"model-00001-of-{len(made.shards):05d}.safetensors"
        assert index is not None
        assert index["metadata"]["total_size"] == 2 * made.params_after
        assert set(index["weight_map"]) == set(names)


def test_groups_sum_to_the_model(dense: Path) -> None:
    made = plan(dense, rank=40)
    assert sum(group.count for group in made.groups) == len(TARGETS)
    saved = sum(group.dense_params - group.params for group in made.groups)
    assert made.params_before - made.params_after == saved
    assert [group.name for group in made.groups][:2] == ["attention.query_key_value", "attention.dense"]


def test_sizes_by_kind_of_a_split_projection_that_stays_whole(dense: Path) -> None:
    """Where all its parts stay dense there is no step for any of them, and each takes its share of the whole."""
    ranks = {name: 8 for name in TARGETS if "query_key_value" not in name or name.startswith("layers.1.")}
    made = plan(dense, rank=ranks, split_fused=True)
    kinds = sizes_by_kind(made.targets, made.steps)
    fused = [target for target in made.targets if "query_key_value" in target.module]
    for part in ("query", "key", "value"):
        own = [target for target in fused if target.module.endswith(f".{part}")]
        kind = kinds[f"attention.query_key_value.{part}"]
        assert kind["matrices"] == len(own) == 3
        assert kind["bytes"]["before"] == 2 * kind["params"]["before"] == 2 * sum(t.dense_params for t in own)
        assert kind["bytes"]["after"] == 2 * kind["params"]["after"] == 2 * sum(t.params for t in own)


def test_json(dense: Path) -> None:
    made = json.loads(json.dumps(plan(dense, rank=16).to_json()))
    assert made["params"]["after"] < made["params"]["before"]
    assert made["svd_ranks"]["layers.0.attention.dense"] == 16


def test_tied_head(fresh: Callable[..., Path]) -> None:
    tensors = random_tensors()
    tensors.pop("embed_out.weight")
    made = plan(fresh(tensors, config={"tie_word_embeddings": True}), rank=16)
    assert made.params_before == sum(tensor.numel() for tensor in tensors.values())


def test_memory_of_a_gpu(tmp_path: Path) -> None:
    """The largest matrix of 1.3B has 8192 x 2048 numbers in two bytes each, and two factors of rank 512."""
    made = plan(polyglot(tmp_path / "1.3b", "1.3b"), rank=512)
    raw, stored = 2 * 8192 * 2048, 2 * 512 * (8192 + 2048)
    one, two, three = (made.device_bytes(workers) for workers in (1, 2, 3))
    assert one > 4 * raw + 2 * stored  # in work, begun, and on the way, once more in float32 by panels
    assert three - two == two - one > 3 * raw + 2 * stored + 8 * 2048**2
    assert two < 10**9


def test_names() -> None:
    assert LAYOUTS["balanced"].names("a.b.weight") == ("a.b.down.weight", "a.b.up.weight")
    assert LAYOUTS["pivoted"].names("a.b.weight") == ("a.b.down.weight", "a.b.up.weight", "a.b.position")
    assert [layout.bias_name("a.b.bias") for layout in LAYOUTS.values()] == ["a.b.up.bias", "a.b.bias"]
    assert suffix("layers.12.mlp.dense_4h_to_h") == "mlp.dense_4h_to_h"
    assert layer_number("layers.12.mlp.dense_4h_to_h") == 12
    assert sorted(["l.10.x", "l.2.x"], key=natural) == ["l.2.x", "l.10.x"]


@pytest.mark.parametrize("text", ["", "5", "x", "-1GB", "999", "1e9"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(InputError):
        parse_size(text)


def test_rank_multiple_and_what_it_costs(dense: Path) -> None:
    """The note counts what the budget allows and the rounded ranks leave."""
    free, rounded = plan(dense, keep=0.6), plan(dense, keep=0.6, rank_multiple=8)
    assert [rank // 8 * 8 for rank in free.ranks.values()] == list(rounded.ranks.values())
    budget = int(0.6 * sum(target.dense_params for target in rounded.targets))
    unused = budget - sum(target.params for target in rounded.targets)
    assert f"multiples of 8, which leaves {unused:,} parameters of the budget unused" in " ".join(rounded.notes)
    assert not any("multiples" in note for note in free.notes)
    assert not any("multiples" in note for note in plan(dense, rank=16, rank_multiple=8).notes)
    assert rounded.settings["rank_multiple"] == 8

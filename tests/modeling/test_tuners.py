"""Every tuner of PEFT on every layout, with the answer that is expected of each: one table.

A tuner is put on the layers by their names, and on their factors; it trains three steps, is saved, loaded onto a fresh
base, and unloaded. On the layers it also has to do what it does on the stock model of the products.
"""

import copy
import functools
from types import SimpleNamespace

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from support.tiny_factored import (
    GEOMETRY,
    LINEARS,
    TARGETS,
    balanced,
    dense_tensors,
    distance,
    load,
    stock_model,
    write_checkpoint,
    write_config,
)

PEFT = tuple(int(part) for part in peft.__version__.split(".")[:2])

# What is expected of a tuner on the layers themselves:
AS_DENSE = "the same numbers as on the dense model of the products"
RUNS = "trains and reloads; its numbers hang on signs of singular vectors, or on a null space, that are arbitrary"
FACTORS = r'target_modules=\["down", "up"\]'  # refused when it is attached, in these words
NOT_PLAIN = "not a plain torch.nn.Linear"  # PEFT refuses every subclass
# and on the factors, where every tuner can be merged that can be anywhere:
MERGES = "trains, reloads and merges"
UNMERGED = "not support"  # trains and reloads; PEFT has no merge for it, and says so in these words
NO_BIAS = "base layer has no bias"  # trains and reloads; the adapter's bias could be merged into `up` alone
CHANGES = "trains, reloads and merges; puts a part of the weight under it into the adapter, or drops it"


def row(config, layers=AS_DENSE, factors=MERGES, since=(0, 13), **options):
    """A line of the table: a class of PEFT with its options, the two answers, and the first version that is meant."""
    return SimpleNamespace(config=config, layers=layers, factors=factors, since=since, options=options)


def lora(*args, since=(0, 13), **options):
    return row("LoraConfig", *args, since=since, r=4, lora_alpha=8, **options)


NEW = {"since": (0, 21)}
INVOKED = [68]  # in the middle of a row of the inputs
TABLE = {
    "LoRA": lora(),
    "rsLoRA": lora(use_rslora=True),
    "LoRA with a bias of its own": lora(AS_DENSE, NO_BIAS, lora_bias=True, **NEW),
    "DoRA": lora(use_dora=True),
    "LoRA gaussian": lora(init_lora_weights="gaussian"),
    "LoRA orthogonal": lora(init_lora_weights="orthogonal", **NEW),
    "LoRA eva": lora(init_lora_weights="eva", **NEW),
    "LoRA mica": lora(RUNS, init_lora_weights="mica", **NEW),
    "PiSSA": lora(FACTORS, CHANGES, init_lora_weights="pissa"),
    "OLoRA": lora(FACTORS, CHANGES, init_lora_weights="olora"),
    "QA-LoRA": lora(use_qalora=True, qalora_group_size=8, **NEW),
    "aLoRA": lora(AS_DENSE, UNMERGED, task_type="CAUSAL_LM", alora_invocation_tokens=INVOKED, **NEW),
    "LoHa": row("LoHaConfig", r=4, **NEW),
    "LoKr": row("LoKrConfig", r=4, **NEW),
    "VeRA": row("VeraConfig", r=4),
    "PVeRA": row("PveraConfig", r=4, **NEW),
    "RandLoRA": row("RandLoraConfig", r=4, randlora_alpha=20, **NEW),
    "OFT": row("OFTConfig", oft_block_size=8, **NEW),
    "BOFT": row("BOFTConfig", boft_block_size=4),
    "HRA": row("HRAConfig", r=4),
    "IA3": row("IA3Config", feedforward_modules=[]),
    "AdaLoRA": row("AdaLoraConfig", total_step=20),
    "FourierFT": row("FourierFTConfig", n_frequency=50),
    "WaveFT": row("WaveFTConfig", n_frequency=50, **NEW),
    "C3A": row("C3AConfig", block_size=8, **NEW),
    "MiSS": row("MissConfig", r=4, **NEW),
    "MiSS bat": row("MissConfig", r=4, init_weights="bat", **NEW),
    "MiSS mini": row("MissConfig", r=4, mini_r=2, init_weights="mini", **NEW),
    "RoAd": row("RoadConfig", group_size=8, **NEW),
    "DeLoRA": row("DeloraConfig", r=4, **NEW),
    "GraLoRA": row("GraloraConfig", r=4, **NEW),
    "VB-LoRA": row("VBLoRAConfig", r=4, num_vectors=16, vector_length=8, topk=2),
    "HiRA": row("HiraConfig", r=4, **NEW),
    "SHiRA": row("ShiraConfig", r=4, random_seed=3, **NEW),
    "OSF": row("OSFConfig", RUNS, effective_rank=4, **NEW),
    "BEFT": row("BeftConfig", AS_DENSE, NO_BIAS, **NEW),
    "Lily": row("LilyConfig", AS_DENSE, UNMERGED, r=4, **NEW),
    "FRoD": row("FrodConfig", RUNS, progressbar=False, **NEW),
    "GLoRA": row("GloraConfig", NOT_PLAIN, r=4, **NEW),
    "UniLoRA": row("UniLoraConfig", r=4, **NEW),
    "TinyLoRA": row("TinyLoraConfig", RUNS, **NEW),
    "PSOFT": row("PsoftConfig", r=4, **NEW),
    "PEANuT": row("PeanutConfig", r=4, **NEW),
    "SuperTuning": row("SupertuningConfig", **NEW),
    "DEFT": row("DeftConfig", RUNS, r=4, **NEW),
    "LN tuning": row("LNTuningConfig", RUNS),  # a trained copy of the layer, here of its factors
}
if PEFT >= (0, 21):
    from peft.tuners.lora.config import KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig

    TABLE |= {
        "KaSA": lora(FACTORS, CHANGES, kasa_config=KasaConfig(), **NEW),
        "LoRA-GA": lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **NEW),
        "MonteCLoRA": lora(monteclora_config=MontecloraConfig(), **NEW),
        "VeLoRA": lora(velora_config=VeloraConfig(num_groups=4), **NEW),
    }
# Tuners that leave the layers alone.
ASIDE = {
    "prompt tuning": row("PromptTuningConfig", num_virtual_tokens=4),
    "prefix tuning": row("PrefixTuningConfig", num_virtual_tokens=4, **NEW),
    "p-tuning": row("PromptEncoderConfig", num_virtual_tokens=4, encoder_hidden_size=16),
    "CPT": row("CPTConfig", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2], **NEW),
    "Cartridge": row("CartridgeConfig", num_virtual_tokens=4, **NEW),
    "trainable tokens": row("TrainableTokensConfig", target_modules=["embed_in"], token_indices=[13, 59], **NEW),
}
TUNERS = [name for name, line in TABLE.items() if line.since <= PEFT]


def split_checkpoint(folder):
    """The balanced checkpoint with queries, keys and values in parts, each of rank 24."""
    whole = write_checkpoint(
        folder, {path: 24 for n in (0, 1) for path in (f"layers.{n}.{name}" for name in LINEARS[1:])}
    )
    heads, hidden = GEOMETRY["num_attention_heads"], GEOMETRY["hidden_size"]
    tensors, product, ranks = whole.tensors, whole.product, dict(whole.ranks)
    for n in (0, 1):
        path = f"layers.{n}.{LINEARS[0]}"
        key = f"gpt_neox.{path}."
        weight = tensors.pop(key + "weight").view(heads, 3, -1, hidden)
        bias = tensors.pop(key + "bias").view(heads, 3, -1)
        dense = []
        for part, name in enumerate(("query", "key", "value")):
            u, s, vh = torch.linalg.svd(weight[:, part].reshape(hidden, hidden).double())
            factors, found = balanced(u[:, :24], s[:24], vh[:24])
            tensors |= {f"{key}{name}.{suffix}": tensor.contiguous() for suffix, tensor in factors.items()}
            tensors[f"{key}{name}.up.bias"] = bias[:, part].reshape(-1).contiguous()
            ranks[f"{path}.{name}"] = 24
            dense.append(found.view(heads, -1, hidden))
        product[key + "weight"] = torch.stack(dense, 1).reshape(3 * hidden, hidden).float()
    save_file(tensors, whole.path / "model.safetensors", {"format": "pt"})
    write_config(whole.path, {**whole.config, "svd_ranks": ranks})
    return whole


@functools.cache
def read_once(path):
    return load(path).eval()


def fresh(path):
    """A model of its own, as it is loaded."""
    return copy.deepcopy(read_once(path))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """By layout."""
    folder = tmp_path_factory.mktemp("tuned")
    made = {layout: write_checkpoint(folder / layout, layout=layout) for layout in ("balanced", "pivoted", "shared")}
    return made | {"split": split_checkpoint(folder / "split")}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits  # aLoRA looks for its tokens in the argument of this name


def attached(base, line, targets):
    torch.manual_seed(7)
    named = {} if targets is None else {"target_modules": targets}
    return get_peft_model(base, getattr(peft, line.config)(**named, **line.options))


def trained(model, ids):
    """Three steps. (A large epsilon: gradients that are nothing but rounding must not become whole steps.)"""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2, eps=1e-3)
    model.train()
    for step in range(3):
        torch.manual_seed(step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def reloaded(adapted, path, ids, tmp_path):
    """The saved adapter on a fresh base; it gives the same logits."""
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(fresh(path), tmp_path / "adapter").eval()
    assert distance(logits(again, ids), logits(adapted, ids)) < 1e-6
    return again


def assert_unchanged(model, path, ids):
    loaded = read_once(path)
    before, after = loaded.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(loaded, ids), logits(model.eval(), ids))


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.mark.parametrize("layout", ["balanced", "pivoted", *slow("shared", "split")])
@pytest.mark.parametrize("tuner", TUNERS)
def test_on_the_layers(checkpoints, layout, tuner, ids, tmp_path):
    line, checkpoint = TABLE[tuner], checkpoints[layout]
    base = fresh(checkpoint.path)
    parts = ["query", "key", "value"] if layout == "split" else []
    targets = [*TARGETS, *parts]
    targets = targets[1:] if parts else targets
    if line.layers in (FACTORS, NOT_PLAIN):
        with pytest.raises((RuntimeError, ValueError), match=line.layers):
            attached(base, line, targets)
        return
    adapted = trained(attached(base, line, targets), ids)
    moved = logits(adapted, ids)
    change = distance(moved, logits(read_once(checkpoint.path), ids))
    assert change > 1e-4
    if line.layers is AS_DENSE and not parts:
        dense = trained(attached(stock_model(checkpoint.product), line, targets), ids)
        assert distance(moved, logits(dense, ids)) < 0.01 * change + 2e-5
    reloaded(adapted, checkpoint.path, ids, tmp_path)
    if tuner not in ("LN tuning", "BEFT") and line.factors is not UNMERGED:
        with pytest.raises(RuntimeError, match="svdconvert fold"):
            adapted.merge_and_unload()
        assert torch.equal(logits(adapted, ids), moved)
    assert_unchanged(adapted.unload(), checkpoint.path, ids)


@pytest.mark.parametrize("layout", ["balanced", *slow("pivoted", "shared", "split")])
@pytest.mark.parametrize("tuner", TUNERS)
def test_on_the_factors(checkpoints, layout, tuner, ids, tmp_path):
    line, checkpoint = TABLE[tuner], checkpoints[layout]
    adapted = trained(attached(fresh(checkpoint.path), line, ["down", "up"]), ids)
    moved = logits(adapted, ids)
    assert distance(moved, logits(read_once(checkpoint.path), ids)) > 1e-4
    again = reloaded(adapted, checkpoint.path, ids, tmp_path)
    if line.factors in (UNMERGED, NO_BIAS):
        with pytest.raises((NotImplementedError, RuntimeError, ValueError), match=f"(?i){line.factors}"):
            again.merge_and_unload()
    else:
        assert distance(logits(again.merge_and_unload().eval(), ids), moved) < 3e-4
    if line.factors is not CHANGES:
        assert_unchanged(adapted.unload(), checkpoint.path, ids)


def test_the_split_checkpoint_is_the_model_of_its_products(checkpoints, ids):
    checkpoint = checkpoints["split"]
    assert distance(logits(load(checkpoint.path), ids), logits(stock_model(checkpoint.product), ids)) < 2e-5
    assert (
        distance(
            checkpoint.product["gpt_neox.layers.0.attention.query_key_value.weight"],
            dense_tensors()["gpt_neox.layers.0.attention.query_key_value.weight"],
        )
        > 0.01
    )


@pytest.mark.parametrize("layout", ["balanced", *slow("pivoted", "shared")])
@pytest.mark.parametrize("tuner", [name for name, line in ASIDE.items() if line.since <= PEFT])
def test_beside_the_layers(checkpoints, layout, tuner, ids, tmp_path):
    line, checkpoint = ASIDE[tuner], checkpoints[layout]
    line.options["task_type"] = "CAUSAL_LM"
    adapted = trained(attached(fresh(checkpoint.path), line, None), ids)
    moved = logits(adapted, ids)
    dense = trained(attached(stock_model(checkpoint.product), line, None), ids)
    assert distance(moved, logits(dense, ids)) < 1e-3
    assert distance(moved[:, -ids.shape[1] :], logits(read_once(checkpoint.path), ids)) > 1e-4
    reloaded(adapted, checkpoint.path, ids, tmp_path)
    base = adapted.unload() if tuner == "trainable tokens" else adapted.get_base_model()
    assert_unchanged(base, checkpoint.path, ids)


def test_refused_by_the_name_of_the_architecture(checkpoints):
    """LLaMA-Adapter has a list of them; the dense GPT-NeoX is not on it either."""
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    model = load(checkpoints["balanced"].path)
    with pytest.raises(ValueError, match="Unsupported model type"):
        get_peft_model(model, config)

"""Tiny factored GPT-NeoX checkpoints, written with plain torch: nothing here comes from the svdconvert package.

The tests run under the newest and under the oldest supported transformers.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

MODELING_FILE = Path(__file__).parents[2] / "modeling" / "modeling_polyglot_svd.py"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"  # the argument of from_pretrained
LINEARS = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
TARGETS = [path.rpartition(".")[2] for path in LINEARS]

# 8 rotary dimensions of 16; at the default rotary_pct of 0.25 they would be 4
GEOMETRY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "max_position_embeddings": 128,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "initializer_range": 0.02,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_parallel_residual": True,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
ROTARY_V4 = {"rotary_pct": 0.5, "rotary_emb_base": 10000}
ROTARY_V5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}}
AUTO_MAP = {
    "AutoConfig": "modeling_polyglot_svd.PolyglotSVDConfig",
    "AutoModel": "modeling_polyglot_svd.PolyglotSVDModel",
    "AutoModelForCausalLM": "modeling_polyglot_svd.PolyglotSVDForCausalLM",
    "AutoModelForSequenceClassification": "modeling_polyglot_svd.PolyglotSVDForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_polyglot_svd.PolyglotSVDForTokenClassification",
}


def layer_paths(names=LINEARS):
    return [f"layers.{n}.{name}" for n in range(GEOMETRY["num_hidden_layers"]) for name in names]


@functools.cache
def dense_tensors():
    """A random dense GPT-NeoX state dict in float32, scaled so that the logits are of the order of 1."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, std):
        return torch.randn(*shape, generator=generator) * std

    hidden, inner, vocab = (GEOMETRY[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    shapes = dict(zip(LINEARS, [(3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)], strict=True))
    tensors = {
        "gpt_neox.embed_in.weight": normal(vocab, hidden, std=1.0),
        "lm_head.weight": normal(vocab, hidden, std=hidden**-0.5),
    }
    norms = ["gpt_neox.final_layer_norm"]
    for n in range(GEOMETRY["num_hidden_layers"]):
        prefix = f"gpt_neox.layers.{n}."
        norms += [prefix + "input_layernorm", prefix + "post_attention_layernorm"]
        for name, (rows, columns) in shapes.items():
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns, std=1.5 * columns**-0.5)
            tensors[f"{prefix}{name}.bias"] = normal(rows, std=0.1)
    for norm in norms:
        tensors[norm + ".weight"] = 1 + normal(hidden, std=0.1)
        tensors[norm + ".bias"] = normal(hidden, std=0.1)
    return tensors


@functools.cache
def svd(key):
    return torch.linalg.svd(dense_tensors()[key].double(), full_matrices=False)


def balanced(u, s, vh):
    """Factors of u diag(s) vh in float32, by suffix, and their product in float64."""
    root = s.sqrt()
    down, up = (root[:, None] * vh).float(), (u * root).float()
    return {"down.weight": down, "up.weight": up}, up.double() @ down.double()


def pivoted(u, s, vh):
    """As `balanced`: rows of u diag(s) vh picked by LU with partial pivoting, and the coefficients of the others."""
    (m, rank), generator = u.shape, torch.Generator().manual_seed(2)
    swaps = torch.linalg.lu_factor(u).pivots.tolist()
    order = list(range(m))
    for n, other in enumerate(swaps):
        order[n], order[other - 1] = order[other - 1], order[n]
    order = torch.tensor(order)
    for part in (order[:rank], order[rank:]):  # no order among them is promised
        part.copy_(part[torch.randperm(len(part), generator=generator)])
    basis, others = u[order].split([rank, m - rank])
    down, up = (basis * s @ vh).float(), torch.linalg.solve(basis, others, left=False).float()
    product = torch.empty(m, vh.shape[1], dtype=torch.float64)
    product[order] = torch.cat([down.double(), up.double() @ down.double()])
    position = torch.tensor([order.tolist().index(n) for n in range(m)])
    return {"down.weight": down, "up.weight": up, "position": position}, product


# "shared" is the balanced layout with one `down` for both layers of a kind
LAYOUTS = {"balanced": (balanced, "up.bias"), "pivoted": (pivoted, "bias"), "shared": (balanced, "up.bias")}


def shared_layers(ranks):
    """svd_shared of the layout "shared": layer 1 uses the factor of layer 0 where both have the same rank."""
    pairs = [(f"layers.1.{name}", f"layers.0.{name}") for name in LINEARS]
    return {path: owner for path, owner in pairs if path in ranks and ranks[path] == ranks.get(owner)}


def factor(ranks, layout="balanced"):
    """The factored state dict, and the dense one whose weights are the products of the factors."""
    factored, product = dict(dense_tensors()), dict(dense_tensors())
    if layout == "shared":
        pairs = shared_layers(ranks)
        for path, owner in pairs.items():
            keys = [f"gpt_neox.{name}." for name in (owner, path)]
            u, s, vh = torch.linalg.svd(torch.cat([factored.pop(key + "weight") for key in keys]).double(), False)
            rank = ranks[path]
            parts, dense = balanced(u[:, :rank], s[:rank], vh[:rank])
            factored[keys[0] + "down.weight"] = parts["down.weight"].contiguous()
            for key, up, weight in zip(keys, parts["up.weight"].chunk(2), dense.chunk(2), strict=True):
                factored[key + "up.weight"], product[key + "weight"] = up.contiguous(), weight.float().contiguous()
                factored[key + "up.bias"] = factored.pop(key + "bias")
        ranks = {path: rank for path, rank in ranks.items() if path not in {*pairs, *pairs.values()}}
    decompose, bias = LAYOUTS[layout]
    for path, rank in ranks.items():
        key = f"gpt_neox.{path}."
        u, s, vh = svd(key + "weight")
        parts, dense = decompose(u[:, :rank], s[:rank], vh[:rank])
        del factored[key + "weight"]
        factored[key + bias] = factored.pop(key + "bias")
        factored.update({key + suffix: part.contiguous() for suffix, part in parts.items()})
        product[key + "weight"] = dense.float()
    return factored, product


def full_ranks(layout):
    """The highest rank of each layer at which a layout can hold the original weight: r < out if it is pivoted.

    Two layers that share are one matrix of twice as many outputs.
    """
    hidden = GEOMETRY["hidden_size"]
    ranks = dict.fromkeys(layer_paths((LINEARS[0], LINEARS[2]) if layout == "pivoted" else LINEARS), hidden)
    return ranks | (dict.fromkeys(layer_paths(LINEARS[3:]), 2 * hidden) if layout == "shared" else {})


def write_checkpoint(folder, ranks=24, layout="balanced", dtype=torch.float32, config=None):
    """Writes a factored checkpoint of every linear layer at one rank, or of those in a dict {path: rank}.

    Returns path, config (dict), ranks, shared (svd_shared), layout, svd_layout, tensors (factored) and product (the
    dense equivalent), in float32.
    """
    ranks = dict.fromkeys(layer_paths(), ranks) if isinstance(ranks, int) else ranks
    tensors, product = factor(ranks, layout)
    shared = shared_layers(ranks) if layout == "shared" else {}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        **GEOMETRY,
        **ROTARY_V4,
        **ROTARY_V5,
        "model_type": "polyglot_svd",
        "architectures": ["PolyglotSVDForCausalLM"],
        "auto_map": AUTO_MAP,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "svd_ranks": ranks,
        # not for the balanced layout: checkpoints from before there was another one do not name it
        **({"svd_layout": layout} if layout == "pivoted" else {}),
        **({"svd_shared": shared} if layout == "shared" else {}),
        **(config or {}),
    }
    write_config(folder, settings)
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(MODELING_FILE, folder)
    return SimpleNamespace(
        path=folder,
        config=settings,
        ranks=ranks,
        shared=shared,
        layout=layout,
        svd_layout=settings.get("svd_layout", "balanced"),
        tensors=tensors,
        product=product,
    )


def write_config(folder, settings):
    (Path(folder) / "config.json").write_text(json.dumps(settings))


def read_config(folder):
    return json.loads((Path(folder) / "config.json").read_text())


def stock_model(tensors, **config):
    """The stock GPTNeoXForCausalLM with these dense tensors, whatever this version calls its head."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**{**GEOMETRY, **ROTARY_V4, **config})).eval()
    tensors = dict(tensors)
    if hasattr(model, "embed_out"):
        tensors["embed_out.weight"] = tensors.pop("lm_head.weight")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all(key.endswith(("attention.bias", "masked_bias", "inv_freq")) for key in missing)
    return model


def load(path, **kwargs):
    return AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **kwargs)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, **kwargs).logits.float()


def distance(a, b):
    return (a - b).abs().max().item()


def saved_tensors(folder):
    return {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}


ONE_LAYOUT = pytest.mark.parametrize("layout", ["balanced"], indirect=True)  # what it tests has no part in layouts
UNSHARED = pytest.mark.parametrize("layout", ["balanced", "pivoted"], indirect=True)  # test_shared.py has the rest
PIVOTED = pytest.mark.parametrize("layout", ["pivoted"], indirect=True)

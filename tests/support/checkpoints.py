"""Tiny random GPT-NeoX checkpoints in every form in which real ones come, written without transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN, LAYERS, HEADS, INNER, VOCAB, POSITIONS = 64, 3, 4, 256, 160, 64
GENERATION = b'{"eos_token_id": 2}'

# The fields and the spelling of polyglot-ko's config.json.
CONFIG: Mapping[str, Any] = {
    "_name_or_path": "./tiny/",
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "classifier_dropout": 0.1,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": POSITIONS,
    "model_type": "gpt_neox",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": VOCAB,
}

LINEARS: Mapping[str, tuple[int, int]] = {
    "attention.query_key_value": (3 * HIDDEN, HIDDEN),
    "attention.dense": (HIDDEN, HIDDEN),
    "mlp.dense_h_to_4h": (INNER, HIDDEN),
    "mlp.dense_4h_to_h": (HIDDEN, INNER),
}
TARGETS = [f"layers.{layer}.{name}" for layer in range(LAYERS) for name in LINEARS]


def random_tensors(seed: int = 0, dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """The parameters of the model, linear layers with a decaying spectrum as trained ones have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {"gpt_neox.embed_in.weight": normal(VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        block = f"gpt_neox.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = 1 + 0.1 * normal(HIDDEN)
            tensors[f"{block}{norm}.bias"] = 0.1 * normal(HIDDEN)
        for name, (out, inp) in LINEARS.items():
            u, _, v = torch.linalg.svd(normal(out, inp), full_matrices=False)
            spectrum = torch.arange(1, min(out, inp) + 1).pow(-0.5)
            tensors[f"{block}{name}.weight"] = 2 * (u * spectrum) @ v
            tensors[f"{block}{name}.bias"] = 0.1 * normal(out)
    tensors["gpt_neox.final_layer_norm.weight"] = 1 + 0.1 * normal(HIDDEN)
    tensors["gpt_neox.final_layer_norm.bias"] = 0.1 * normal(HIDDEN)
    tensors["embed_out.weight"] = 0.3 * normal(VOCAB, HIDDEN)
    return {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}


def legacy_buffers() -> dict[str, torch.Tensor]:
    """What the published polyglot-ko files carry beside the parameters."""
    buffers = {}
    for layer in range(LAYERS):
        block = f"gpt_neox.layers.{layer}.attention."
        buffers[f"{block}bias"] = torch.ones(1, 1, POSITIONS, POSITIONS).tril().to(torch.uint8)
        buffers[f"{block}masked_bias"] = torch.tensor(-1e9)
        buffers[f"{block}rotary_emb.inv_freq"] = torch.rand(4)
    return buffers


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, torch.Tensor] | None = None,
    *,
    shards: int = 1,
    pickled: bool = False,
    legacy: bool = False,
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    generation: bytes | None = GENERATION,
) -> Path:
    """Write a checkpoint.

    Args:
        folder: created if need be.
        tensors: by default :func:`random_tensors`.
        shards: number of weight files; cut without regard to layers, so that a layer lies in two of them.
        pickled: ``pytorch_model*.bin`` instead of safetensors.
        legacy: add :func:`legacy_buffers`.
        config: changes to :data:`CONFIG`.
        tokenizer: add side files as on the Hub.
        generation: generation_config.json, which older checkpoints and those saved by AutoModel do not have.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = dict(tensors or random_tensors()) | (legacy_buffers() if legacy else {})
    stem, ending = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    names = sorted(everything)
    per_file = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        part = names[i * per_file : (i + 1) * per_file]
        file = f"{stem}.{ending}" if shards == 1 else f"{stem}-{i + 1:05d}-of-{shards:05d}.{ending}"
        content = {name: everything[name].clone() for name in part}
        if pickled:
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        total = sum(tensor.nbytes for tensor in everything.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(dict(CONFIG) | dict(config or {})))
    if tokenizer:
        write_tokenizer(folder)
    if generation is not None:
        (folder / "generation_config.json").write_bytes(generation)
    return folder


def pickle_weights(folder: Path) -> None:
    """Make a safetensors checkpoint one of ``pytorch_model*.bin``, file by file."""
    for file in sorted(folder.glob("*.safetensors")):
        torch.save(
            load_file(file), folder / (file.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        )
        file.unlink()
    for index in folder.glob("model.safetensors.index.json"):
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges, and the files that go with it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<|endoftext|>", "<|sep|>"])}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - len(vocabulary)]:
        vocabulary[symbol] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "LICENSE").write_text("a licence")
    (folder / "README.md").write_text("---\nlanguage: ko\nlicense: apache-2.0\ntags:\n- korean\n---\n\n# tiny\n")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors checkpoint."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not tensors.keys() & part.keys()
        tensors |= part
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """Parsed config.json."""
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


def content(path: Path) -> object:
    """What must be equal: everything but how long it took.

    A digest stands for what is no record, so that what differs is short enough for a test's report.
    """
    if path.name != "svdconvert.json":
        return f"{path.stat().st_size} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}"

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(v) for key, v in value.items() if key not in ("seconds", "timing")}
        return value

    return timeless(json.loads(path.read_text()))


def tree(folder: Path, but: str = "") -> dict[str, object]:
    """What a folder holds, by path; ``but`` one file."""
    paths = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: content(path) for name, path in paths.items() if name != but}

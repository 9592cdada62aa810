"""Random checkpoints of the exact geometry of polyglot-ko: the same files, names, types and sizes as on the Hub.

    python -m tests.benchmarks.geometry 3.8b --out DIR
    python -m tests.benchmarks.geometry 1.3b --out DIR --layers 2 --hidden 512 --spectrum gauss

Weight values are the only thing that is made up. One random matrix is drawn per shape; every layer gets it with its
rows permuted, its columns' signs flipped and its rows scaled by a lognormal factor. That keeps the spectrum (but for
the scaling, 5 %) and costs a tenth of drawing anew, so a checkpoint is written at about the speed of the disk.

Spectra, before the scaling:

* ``llm``: Gaussian noise plus a quarter-rank term whose singular values fall like (i + 5)^-0.6 from 4 times the
  noise's, the first six 3 times larger: outliers and a power law over a Marchenko-Pastur bulk, which is what trained
  linear layers look like. sigma_1 is about 15 times the singular value at a quarter of the full rank;
* ``steep``: the same with one direction 10 times as strong, beyond what the solver does in float32;
* ``power``: Gaussian columns (of the longer side) scaled by j^-0.5;
* ``gauss``: independent Gaussian entries, the hardest case for every low-rank method.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

SPECTRA = ("llm", "steep", "power", "gauss")
VOCAB, POSITIONS, ROTARY_DIMS = 30080, 2048, 64
MAX_SHARD_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Geometry:
    """Sizes of a GPT-NeoX model."""

    name: str
    hidden: int
    layers: int
    heads: int
    rotary_pct: float = 0.5
    num_steps: str = ""
    vocab: int = VOCAB

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Module path within a layer -> [out, in]."""
        h = self.hidden
        return {
            "attention.query_key_value": (3 * h, h),
            "attention.dense": (h, h),
            "mlp.dense_h_to_4h": (4 * h, h),
            "mlp.dense_4h_to_h": (h, 4 * h),
        }

    @property
    def config(self) -> dict[str, Any]:
        """config.json, fields and order as published."""
        config: dict[str, Any] = {
            "_name_or_path": f"./polyglot-ko-{self.name}/",
            "architectures": ["GPTNeoXForCausalLM"],
            "bos_token_id": 0,
            "classifier_dropout": 0.1,
            "eos_token_id": 2,
            "hidden_act": "gelu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": 4 * self.hidden,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": POSITIONS,
            "model_type": "gpt_neox",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_steps": self.num_steps,
            "rotary_emb_base": 10000,
            "rotary_pct": self.rotary_pct,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.29.2",
            "use_cache": True,
            "use_parallel_residual": True,
            "vocab_size": self.vocab,
        }
        return {key: value for key, value in config.items() if value != ""}

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """``(name, type code, shape)`` in the order of the model's state dict.

        The published files were written by transformers 4.29.2 and hold its buffers too. The listing fixes the causal
        mask's type; that the other two are float16 is an assumption, which changes no size visibly.
        """
        h = self.hidden
        yield "gpt_neox.embed_in.weight", "F16", (self.vocab, h)
        for layer in range(self.layers):
            block = f"gpt_neox.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{block}{norm}.weight", "F16", (h,)
                yield f"{block}{norm}.bias", "F16", (h,)
            yield f"{block}attention.bias", "BOOL", (1, 1, POSITIONS, POSITIONS)
            yield f"{block}attention.masked_bias", "F16", ()
            yield f"{block}attention.rotary_emb.inv_freq", "F16", (ROTARY_DIMS // 2,)
            for module, shape in self.linears.items():
                yield f"{block}{module}.weight", "F16", shape
                yield f"{block}{module}.bias", "F16", shape[:1]
        yield "gpt_neox.final_layer_norm.weight", "F16", (h,)
        yield "gpt_neox.final_layer_norm.bias", "F16", (h,)
        yield "embed_out.weight", "F16", (self.vocab, h)

    def shards(self, max_bytes: int = MAX_SHARD_BYTES) -> list[list[tuple[str, str, tuple[int, ...]]]]:
        """The tensors of every weight file.

        transformers 4.29.2 counted a boolean as an eighth of a byte, although safetensors gives it a whole one. Only
        with that slip do the sizes come out as listed: 1.00, 1.02 and 0.75 GB for the 1.3B model, 957, 999, 1003,
        999, 999, 1003, 999 and 797 MB for the 3.8B one.
        """
        files: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
        counted = 0.0
        for tensor in self.tensors():
            size = math.prod(tensor[2]) * (2 if tensor[1] == "F16" else 1 / 8)
            if counted + size > max_bytes and files[-1]:
                files.append([])
                counted = 0.0
            files[-1].append(tensor)
            counted += size
        return files


MODELS = {
    geometry.name: geometry
    for geometry in (
        Geometry("1.3b", 2048, 24, 16),
        Geometry("3.8b", 3072, 32, 24),
        Geometry("5.8b", 4096, 28, 16, rotary_pct=0.25, num_steps="global_step320000"),
        Geometry("12.8b", 5120, 40, 40, num_steps="global_step301000"),
    )
}


def resized(geometry: Geometry, *, hidden: int = 0, layers: int = 0, vocab: int = 0) -> Geometry:
    """The same family in another size; zeros keep what is there. Heads stay 64 wide where the size is changed."""
    if hidden:
        geometry = replace(geometry, hidden=hidden, heads=max(hidden // 64, 1))
    return replace(geometry, layers=layers or geometry.layers, vocab=vocab or geometry.vocab)


class Weights:
    """Draws the tensors of a checkpoint, each from its own seed: the same whatever the order and the sharding."""

    def __init__(self, spectrum: str = "llm", seed: int = 0) -> None:
        """Prepare; matrices are drawn when they are first needed.

        Args:
            spectrum: one of :data:`SPECTRA`.
            seed: another one gives another checkpoint.
        """
        if spectrum not in SPECTRA:
            raise ValueError(f"unknown spectrum {spectrum}")
        self._spectrum, self._seed = spectrum, seed
        self._bases: dict[tuple[int, int], Tensor] = {}

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor of the checkpoint, in the type in which it is stored."""
        import torch

        generator = self._generator(name)
        if name.endswith("attention.bias"):
            return torch.ones(shape[-2:], dtype=torch.bool).tril_().view(shape)
        if name.endswith("masked_bias"):
            return torch.tensor(-torch.inf, dtype=torch.float16)  # -1e9 in float16
        if name.endswith("inv_freq"):
            return (10000 ** -(torch.arange(shape[0]) / shape[0])).half()
        if name.endswith(("layernorm.weight", "layer_norm.weight")):
            return (1 + 0.1 * torch.randn(shape, generator=generator)).half()
        if len(shape) == 1 or "embed" in name:
            return torch.randn(shape, generator=generator).mul_(0.02).half()
        return self.matrix((shape[0], shape[1]), name)

    def matrix(self, shape: tuple[int, int], name: str) -> Tensor:
        """The weight of a linear layer, [out, in] in float16, entries of about 0.02."""
        import torch

        base = self._bases.get(shape)
        if base is None:
            base = self._bases[shape] = self._base(shape)
        generator = self._generator(name)
        rows, columns = shape
        scale = torch.exp(0.05 * torch.randn(rows, 1, generator=generator))
        signs = torch.randint(0, 2, (columns,), generator=generator).mul_(2).sub_(1)
        permuted = base.index_select(0, torch.randperm(rows, generator=generator))
        return permuted.mul_(signs.half()).mul_(scale.half())

    def _base(self, shape: tuple[int, int]) -> Tensor:
        import torch

        generator = self._generator(f"base {shape}")
        long, short = max(shape), min(shape)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator)

        matrix = normal(long, short)
        if self._spectrum == "power":
            matrix *= torch.arange(1, short + 1).pow(-0.5)
        if self._spectrum in ("llm", "steep"):
            q = max(short // 4, 1)
            # Gaussian frames are near enough to orthonormal ones, and cost no QR.
            left, right = normal(long, q) / math.sqrt(long), normal(q, short) / math.sqrt(short)
            noise = math.sqrt(long) + math.sqrt(short)
            values = 4 * noise * ((torch.arange(q) + 5) / 5).pow(-0.6)
            values[:6] *= 3
            if self._spectrum == "steep":
                values[0] *= 10
            matrix.addmm_(left * values, right)
        matrix *= 0.02 / matrix.square().mean().sqrt()
        return (matrix if shape[0] >= shape[1] else matrix.T).half().contiguous()

    def _generator(self, name: str) -> Any:
        import torch

        return torch.Generator().manual_seed(zlib.crc32(name.encode()) * 1000 + self._seed)


def write(
    geometry: Geometry,
    folder: Path,
    *,
    spectrum: str = "llm",
    seed: int = 0,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write a checkpoint, one tensor in memory at a time.

    Args:
        geometry: what to write.
        folder: created if need be; weight files of an earlier run are replaced.
        spectrum: one of :data:`SPECTRA`.
        seed: of the weights.
        max_shard_bytes: limit of a weight file, in transformers' own count.

    Returns:
        Bytes of the tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    weights = Weights(spectrum, seed)
    shards = geometry.shards(max_shard_bytes)
    weight_map, total = {}, 0
    for i, tensors in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        total += _write_file(folder / file, tensors, weights)
        weight_map |= {name: file for name, _, _ in tensors}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", geometry.config)
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 0, "transformers_version": "4.29.2"},
    )
    return total


def _write_file(path: Path, tensors: list[tuple[str, str, tuple[int, ...]]], weights: Weights) -> int:
    """A safetensors file, laid out as the library does it: wider types first, then by name."""
    sizes = {"F16": 2, "BOOL": 1}
    ordered = sorted(tensors, key=lambda tensor: (-sizes[tensor[1]], tensor[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, code, shape in ordered:
        end = position + math.prod(shape) * sizes[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name, _, shape in ordered:
            handle.write(memoryview(weights.tensor(name, shape).contiguous().view(-1).numpy()).cast("B"))
    return position


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.geometry", description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the model has")
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size")
    parser.add_argument("--vocab", type=int, default=0, help="another vocabulary size")
    parser.add_argument("--shard-bytes", type=int, default=MAX_SHARD_BYTES, help="limit of a weight file")
    parser.add_argument("--spectrum", choices=SPECTRA, default="llm")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    geometry = resized(MODELS[options.model], hidden=options.hidden, layers=options.layers, vocab=options.vocab)
    start = time.perf_counter()
    need = sum(math.prod(shape) * 2 for _, _, shape in geometry.tensors())
    options.out.mkdir(parents=True, exist_ok=True)
    if need > (free := shutil.disk_usage(options.out).free):
        parser.error(f"{need / 1e9:.1f} GB do not fit the {free / 1e9:.1f} GB that are free")
    total = write(
        geometry,
        options.out,
        spectrum=options.spectrum,
        seed=options.seed,
        max_shard_bytes=options.shard_bytes,
    )
    print(f"{total:,} bytes in {len(geometry.shards(options.shard_bytes))} files, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

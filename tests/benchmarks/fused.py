"""Fused projections: one product for all of their parts, or one for each part, at equal parameters.

    python -m tests.benchmarks.fused --out out/fused
    python -m tests.benchmarks.fused --model llama/model --calib llama/calibration.txt --text llama/heldout.txt \
        --out out/fused_llama

GPT-NeoX has queries, keys and values in one matrix, head by head; Phi-3 has them one after the other, and the two
inputs of its gate in another matrix. A LLaMA is merged into the Phi-3 that computes the same function, so that a model
that was trained with separate projections is seen from the other side.

A fused matrix of rank r holds one inner factor for all of its parts; parts of their own have one each, in the metric of
their own outputs, and a rank each. Everything else is as in a conversion: all linear layers are factored under one
budget, with the project's own decompositions and allocation. The products are written into the dense model in memory,
in float32, and the held-out perplexity is measured. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3Config, Phi3ForCausalLM

from svdconvert import Calibration
from svdconvert.calibration.collector import part_statistics
from svdconvert.calibration.run import StatisticsRun
from svdconvert.commands.evaluate import negative_log_likelihood
from svdconvert.families.row import Fused, Section
from svdconvert.families.table import dense_architecture
from svdconvert.layouts.table import LAYOUTS
from svdconvert.linalg.exact import decompose, truncate
from svdconvert.methods.statistics import ModuleStatistics, Needs
from svdconvert.methods.table import METHODS, method_options
from svdconvert.models.passages import read_passage
from svdconvert.names import suffix
from svdconvert.planning.allocation import allocate
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import choose_targets
from svdconvert.storage.source import LocalSource

from .harness import add_bundled, new_parser, save_at

# What `--split-fused` leaves together.
GATE = Fused(lambda config: (config["intermediate_size"],) * 2, names=("gate", "up"))

# Method, allocation, layout.
ROWS = (
    ("svd", "uniform", "balanced"),
    ("whiten", "uniform", "balanced"),
    ("whiten", "global", "balanced"),
    ("kfac", "uniform", "balanced"),
    ("kfac", "global", "balanced"),
    ("kfac", "global", "pivoted"),
)


@dataclass(frozen=True)
class Piece:
    """What gets one product: a whole matrix, or a part of a fused one.

    Attributes:
        target: its shape is that of the part.
        section: its outputs among those of the matrix.
    """

    target: Target
    section: Section


def main() -> None:
    """Run the comparison."""
    parser = new_parser("fused", out=False)
    add_bundled(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--window", type=int, default=256)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        results = compare(options, Path(temporary))
    save_at(options.out, results, table(results))


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rows at all budgets, fused and with each kind of fused projection split."""
    path = options.model
    if json.loads((path / "config.json").read_text())["model_type"] == "llama":
        path = merged(path, folder / "merged")
    source = LocalSource(path)
    row = dense_architecture(source.config, source.name)
    targets = choose_targets(source.tensors, row, ())
    known_parts = {name: row.fused.get(name, GATE) for name in row.targets if name in (*row.fused, "mlp.gate_up_proj")}
    fused = list(known_parts)
    splits = [(), *([(name,) for name in fused]), *([tuple(fused)] if len(fused) > 1 else [])]
    if not fused or row.transposed:
        raise SystemExit(f"{row.model_type} has no fused projections that are cut here")

    calibration = Calibration(options.calib, samples=options.samples, length=options.length, batch_size=16)
    known: dict[str, ModuleStatistics] = {}
    needs, modules = Needs(input_gram=True, output_gram=True), [target.module for target in targets]
    tokens = calibration.tokens(source)
    for _, found in StatisticsRun(source, tokens, needs, modules, work=folder / "work", batch_size=16):
        known |= found

    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    weights = {target.module: model.base_model.get_submodule(target.module).weight for target in targets}
    dense = {module: weight.detach().clone() for module, weight in weights.items()}
    passage = read_passage(path, source.config, options.text, options.window, None)

    def perplexity() -> float:
        return math.exp(negative_log_likelihood(model, passage, 32) / passage.tokens)

    results: dict[str, Any] = {
        "model": options.model.name,
        "model_type": row.model_type,
        "dense_perplexity": (before := perplexity()),
        "calibration": {"samples": options.samples, "length": options.length},
        "window": options.window,
        "rows": [],
    }
    for split in splits:
        chosen = {name: known_parts[name] for name in split}
        parts = [piece for target in targets for piece in pieces(source.config, target, chosen)]
        for method, allocation, layout in ROWS:
            for keep in options.keep:
                params = 0
                for piece, rank, product in products(parts, dense, known, method, allocation, layout, keep):
                    with torch.no_grad():
                        piece.section.put(product, weights[piece.target.module])
                    shape = piece.target.shape
                    params += math.prod(shape) if rank is None else LAYOUTS[layout].cost(rank, shape)
                after = perplexity()
                name = f"{method}, {allocation}" + (", pivoted" if layout == "pivoted" else "")
                results["rows"].append(
                    {
                        "name": name,
                        "split": list(split),
                        "keep": keep,
                        "share": params / sum(target.dense_params for target in targets),
                        "perplexity": after,
                        "added": math.log(after / before),
                    }
                )
                print(split, name, keep, f"{params:,}", f"{after:.2f}", f"+{math.log(after / before):.4f}", flush=True)
    return results


def products(
    parts: list[Piece],
    dense: Mapping[str, Tensor],
    known: Mapping[str, ModuleStatistics],
    method: str,
    allocation: str,
    layout: str,
    keep: float,
) -> Iterator[tuple[Piece, int | None, Tensor]]:
    """Each piece with its rank and the best product of it; None where the budget keeps it whole."""
    options = method_options(METHODS[method], {})
    stored = LAYOUTS[layout]
    found = []
    for piece in parts:
        entry = known[piece.target.module]
        left, right = METHODS[method].metrics(part_statistics(entry, piece.section), options)
        weight = piece.section.of(dense[piece.target.module])
        found.append((weight, decompose(weight, None, left, right), left, right))
    ranks: list[int | None]
    if allocation == "global":
        budget = int(keep * sum(piece.target.dense_params for piece in parts))
        spectra = [decomposition.spectrum.numpy() for _, decomposition, _, _ in found]
        ranks = allocate([piece.target for piece in parts], spectra, budget, cost=stored.cost)
    else:
        ranks = [stored.highest_rank(piece.target.shape, keep * piece.target.dense_params) for piece in parts]
    for piece, rank, (weight, decomposition, left, right) in zip(parts, ranks, found, strict=True):
        if rank is None:
            yield piece, rank, weight
            continue
        factors = truncate(weight, decomposition, rank, torch.float32, None, left, right)
        yield piece, rank, factors.up @ factors.down


def pieces(config: Mapping[str, Any], target: Target, split: Mapping[str, Fused]) -> list[Piece]:
    """A target whole, or cut into its parts."""
    fused = split.get(suffix(target.module))
    sections = [Section(0, target.shape[0])] if fused is None else fused.sections(config).values()
    return [Piece(replace(target, shape=(section.outputs, target.shape[1])), section) for section in sections]


def merged(path: Path, out: Path) -> Path:
    """A LLaMA as the Phi-3 of the same function."""
    llama = AutoModelForCausalLM.from_pretrained(path).float().eval()
    same = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "max_position_embeddings rms_norm_eps tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    ).split()
    rotary = {"original_max_position_embeddings": llama.config.max_position_embeddings}
    phi3 = Phi3ForCausalLM(Phi3Config(**{name: getattr(llama.config, name) for name in same}, **rotary)).eval()
    tensors = dict(llama.state_dict())
    for layer in range(llama.config.num_hidden_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        tensors[attention + "qkv_proj.weight"] = torch.cat([tensors.pop(f"{attention}{x}_proj.weight") for x in "qkv"])
        halves = [tensors.pop(f"{mlp}{name}_proj.weight") for name in ("gate", "up")]
        tensors[mlp + "gate_up_proj.weight"] = torch.cat(halves)
    phi3.load_state_dict(tensors)
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        assert torch.allclose(phi3(ids).logits, llama(ids).logits, atol=1e-4), (
            "the merged model computes another function"
        )
    phi3.save_pretrained(out)
    AutoTokenizer.from_pretrained(path).save_pretrained(out)
    return out


def table(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    keeps = list(dict.fromkeys(row["keep"] for row in results["rows"]))
    lines = [
        f"{results['model_type']}, dense perplexity {results['dense_perplexity']:.2f} (window {results['window']}); in "
        "each cell perplexity and added log-perplexity, at equal parameters.",
        "",
        "| | split | " + " | ".join(f"{keep:.0%} kept" for keep in keeps) + " |",
        "|---" * (len(keeps) + 2) + "|",
    ]
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        for split in dict.fromkeys(tuple(row["split"]) for row in results["rows"]):
            cells = {
                row["keep"]: row for row in results["rows"] if row["name"] == name and tuple(row["split"]) == split
            }
            lines.append(
                f"| {name} | {', '.join(part.rpartition('.')[2] for part in split) or 'nothing'} | "
                + " | ".join(f"{cells[keep]['perplexity']:.2f} (+{cells[keep]['added']:.3f})" for keep in keeps)
                + " |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

"""`--method whiten` gives the perplexity of SVD-LLM (arXiv:2403.07378), written out in memory in float64.

The recipe as published, on the bundled trained model: second moments of every layer's inputs by hooks, a Cholesky root
S, the SVD of W S, its truncation times S^-1. It shares no code with the package but the choice of calibration tokens.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from svdconvert import Calibration, convert
from svdconvert.storage.source import LocalSource

TINY = Path(__file__).parents[2] / "examples" / "tiny_polyglot"


def perplexity(model: nn.Module, ids: torch.Tensor) -> float:
    total = 0.0
    with torch.no_grad():
        for batch in ids.split(8):
            logits = model(batch).logits[:, :-1]
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / ids[:, 1:].numel())


def svd_llm(model: GPTNeoXForCausalLM, ids: torch.Tensor, ranks: dict[str, int]) -> None:
    """Replaces the weights by their truncations; `model` is in float64."""
    grams: dict[str, torch.Tensor] = {}

    def hook(name: str, inputs: torch.Tensor) -> None:
        rows = inputs.flatten(0, 1)
        grams[name] = grams.get(name, 0) + rows.T @ rows

    layers = {name: model.gpt_neox.get_submodule(name) for name in ranks}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: hook(name, args[0]))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for batch in ids.split(8):
            model(batch)
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            root = torch.linalg.cholesky(grams[name])
            u, s, v = torch.linalg.svd(layer.weight @ root, full_matrices=False)
            rank = ranks[name]
            layer.weight.copy_((u[:, :rank] * s[:rank]) @ v[:rank] @ torch.linalg.inv(root))


def test_whiten_has_the_perplexity_of_svd_llm(tmp_path: Path) -> None:
    calibration = Calibration(str(TINY / "calibration.txt"), samples=32, length=128)
    source = TINY / "model"
    report = convert(
        source, tmp_path / "out", keep=0.5, method="whiten", calibration=calibration, dtype="float32", device="cpu"
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    held_out = tokenizer((TINY / "heldout.txt").read_text(encoding="utf-8")[:12_000])["input_ids"]
    held_out = torch.tensor(held_out[: len(held_out) // 128 * 128]).view(-1, 128)

    theirs = GPTNeoXForCausalLM.from_pretrained(source, dtype=torch.float64).eval()
    dense = perplexity(theirs, held_out)
    svd_llm(theirs, calibration.tokens(LocalSource(source)).ids, report.plan.ranks)
    expected = perplexity(theirs, held_out)
    found = perplexity(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval(), held_out)
    assert expected > 1.05 * dense  # else any truncation would pass
    assert abs(found / expected - 1) < 1e-3

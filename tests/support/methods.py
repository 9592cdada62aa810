"""Methods that look at data, and gradients as autograd gives them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GPTNeoXForCausalLM

from support.checkpoints import TARGETS
from svdconvert import Calibration
from svdconvert.methods.table import METHODS

DATA_AWARE = [name for name, row in METHODS.items() if row.statistics]


def gradients(dense: Path, calibration: Calibration) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(E[x x^T], E[g g^T], mean |x|) of every target by hooks on the stock model, float64, all at once."""
    from svdconvert.storage.source import LocalSource

    model = GPTNeoXForCausalLM.from_pretrained(dense, attn_implementation="eager").double().eval()
    ids = calibration.tokens(LocalSource(dense)).ids
    seen: dict[str, list[torch.Tensor]] = {}
    for name in TARGETS:
        module = model.gpt_neox.get_submodule(name)

        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> None:
            output.retain_grad()
            seen[name] = [inputs[0].detach(), output]

        module.register_forward_hook(hook)
    logits = model(ids).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    loss.backward()
    result = {}
    for name, (inputs, output) in seen.items():
        x = inputs.flatten(0, 1)
        assert output.grad is not None
        g = output.grad.flatten(0, 1)
        result[name] = (x.T @ x / len(x), g.T @ g / len(g), x.abs().mean(0))
    return result

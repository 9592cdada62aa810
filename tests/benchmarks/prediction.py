"""Where the predicted and the measured loss of a truncation part.

    python -m tests.benchmarks.prediction --out docs/prediction

By default on the bundled model. With E what truncation takes from the weights of a layer, x its inputs and g the
gradients at its outputs, in nats per token of the calibration text:

* predicted: 1/2 tr(G E C E^T), G = E[g g^T] and C = E[x x^T], summed over the layers;
* x and g together: 1/2 E[(g^T E x)^2], summed over the layers;
* one at a time: the Kullback-Leibler divergence from the dense model of models with one truncated layer, summed;
* all at once: the same of the model with all of them;
* even and odd part of the loss: (L(E) + L(-E)) / 2 - L(0) and (L(E) - L(-E)) / 2, L(-E) with the opposite of E;
* measured: L(E) - L(0), the sum of the two.

Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .harness import BUNDLED, new_parser, save_at

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH = 16

LINES = {
    "kronecker": "predicted (shrinkage 0)",
    "together": "x and g together",
    "single": "one layer at a time, KL",
    "divergence": "all at once, KL",
    "even": "loss, even part",
    "odd": "loss, odd part",
    "measured": "measured",
}


class Comparison:
    """A dense model, and what truncation takes from its layers."""

    def __init__(self, model: Path, factored: Path, modules: list[str], ids: Tensor) -> None:
        """Load both.

        Args:
            model, factored: folders of the dense and the factored model.
            modules: the factored layers.
            ids: [N, length], the text.
        """
        import torch
        from transformers import AutoModelForCausalLM

        self.ids = ids
        self.dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        other = AutoModelForCausalLM.from_pretrained(factored, trust_remote_code=True, dtype=torch.float32).eval()
        names = [f"{self.dense.base_model_prefix}.{name}" for name in modules]
        self.layers: dict[str, nn.Module] = {name: self.dense.get_submodule(name) for name in names}
        self.weights: dict[str, Tensor] = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}
        with torch.no_grad():
            self.lost = {
                name: self.weights[name] - _matrix(other.get_submodule(name), weight.shape[1])
                for name, weight in self.weights.items()
            }
            self.reference = [self._logits(part) for part in ids.split(BATCH)]
        self.nll = self._losses()[0]

    def together(self) -> float:
        """1/2 E[(g^T E x)^2] over the tokens, summed over the layers."""
        import torch

        total = 0.0

        def hook(name: str) -> Callable[..., None]:
            def forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                change = args[0].detach() @ self.lost[name].T

                def backward(gradient: Tensor) -> None:
                    nonlocal total
                    total += float((gradient * change).sum(-1).double().square().sum())

                output.register_hook(backward)

            return forward

        handles = [layer.register_forward_hook(hook(name)) for name, layer in self.layers.items()]
        for part in self.ids.split(BATCH):
            logits = self.dense(part).logits[:, :-1].flatten(0, 1)
            torch.nn.functional.cross_entropy(logits, part[:, 1:].flatten(), reduction="sum").backward()
            self.dense.zero_grad()
        for handle in handles:
            handle.remove()
        return total / self.ids.numel() / 2

    def at(self, factors: Mapping[str, float]) -> tuple[float, float]:
        """``(loss added, KL divergence)`` with so many times E taken from each layer."""
        import torch

        with torch.no_grad():
            for name, layer in self.layers.items():
                layer.weight.copy_(self.weights[name] - factors.get(name, 0.0) * self.lost[name])
            nll, divergence = self._losses()
            for name, layer in self.layers.items():
                layer.weight.copy_(self.weights[name])
        return nll - self.nll, divergence

    def _logits(self, part: Tensor) -> Tensor:
        return self.dense(part).logits[:, :-1].log_softmax(-1)

    def _losses(self) -> tuple[float, float]:
        import torch

        nll = divergence = 0.0
        with torch.no_grad():
            for part, reference in zip(self.ids.split(BATCH), self.reference, strict=True):
                found = self._logits(part)
                nll -= float(found.gather(-1, part[:, 1:, None]).double().sum())
                divergence += float((reference.exp() * (reference - found)).sum(-1).double().sum())
        count = self.ids[:, 1:].numel()
        return nll / count, divergence / count


def _matrix(layer: nn.Module, width: int) -> Tensor:
    """The matrix of a factored layer, [out, in], by what it does to unit vectors."""
    import torch

    return (layer(torch.eye(width)) - layer(torch.zeros(1, width))).T


def measure(options: argparse.Namespace, keep: float, folder: Path) -> dict[str, float]:
    """All the lines at one budget."""
    from svdconvert import Calibration, convert
    from svdconvert.storage.source import LocalSource

    text = Calibration(options.calib, samples=options.samples, length=options.length, batch_size=BATCH)
    report = convert(
        options.model,
        folder / f"out-{keep}",
        keep=keep,
        method="kfac",
        shrinkage=0.0,
        layout=options.layout,
        calibration=text,
        work=folder / "work",
        dtype="float32",
        device="cpu",
        check=False,
    )
    ids = text.tokens(LocalSource(options.model)).ids[:: max(options.samples // options.measured, 1)]
    both = Comparison(options.model, report.folder, list(report.matrices), ids)
    names = list(both.layers)
    (measured, divergence), (opposite, _) = (both.at(dict.fromkeys(names, sign)) for sign in (1.0, -1.0))
    return {
        "kronecker": float(report.outcome.record["predicted_loss"]),
        "together": both.together(),
        "single": sum(both.at({name: 1.0})[1] for name in names),
        "divergence": divergence,
        "even": (measured + opposite) / 2,
        "odd": (measured - opposite) / 2,
        "measured": measured,
    }


def main() -> None:
    """Command line."""
    parser = new_parser("prediction", out=False)
    parser.add_argument("--model", type=Path, default=BUNDLED / "model", help="without Conv1D layers")
    parser.add_argument("--calib", default=str(BUNDLED / "calibration.txt"))
    parser.add_argument("--layout", default="balanced")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--samples", type=int, default=256, help="sequences to calibrate on")
    parser.add_argument("--measured", type=int, default=32, help="sequences of them to measure on")
    parser.add_argument("--length", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        results = {f"{keep:.0%}": measure(options, keep, Path(temporary)) for keep in options.keep}
    lines = ["| nats per token | " + " | ".join(f"{keep} kept" for keep in results) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for line, name in LINES.items():
        lines.append(f"| {name} | " + " | ".join(f"{found[line]:.4f}" for found in results.values()) + " |")
    save_at(options.out, results, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

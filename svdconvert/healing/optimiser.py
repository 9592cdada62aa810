"""What moves the factors and scales in training.

Factors are matrices, and move by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): a step is the
running mean of the gradients with all its singular values brought near to 1, so that all directions move alike.
docs/heal.md tells what that is worth against AdamW. Scales of weights in few bits are many numbers of their own, and
move by AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

# A training's state says what moved the numbers in it.
NAME = "Muon"
# Of the running mean.
MOMENTUM = 0.95
# Root mean square of a step's entries at learning rate 1, about that of AdamW's steps (arXiv:2502.16982, equation 4).
SIZE = 0.2
# Of the quintic x -> a x + b x^3 + c x^5 that brings singular values in (0, 1] to 0.7 to 1.2 when it is taken so often.
QUINTIC, TIMES = (3.4445, -4.7750, 2.0315), 5
# Of AdamW, and what it keeps.
BETAS, MOMENTS = (0.9, 0.95), ("exp_avg", "exp_avg_sq")


def orthogonal(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """About U V^T of a matrix U S V^T, [m, n] float32: every singular value but the smallest is 0.7 to 1.2.

    Args:
        matrix: [m, n], of any size; 0 gives 0.
        precision: of the products.
    """
    a, b, c = QUINTIC
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    tiny = torch.finfo(x.dtype).tiny
    x = x / torch.linalg.vector_norm(x, math.inf).clamp_min(tiny)  # or squares of small entries would be 0
    x = (x / torch.linalg.vector_norm(x).clamp_min(tiny)).to(precision)
    for _ in range(TIMES):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon:
    """Muon with Nesterov's momentum. What has no gradient at a step, as experts without a token, does not move."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], precision: torch.dtype) -> None:
        """Start with nothing behind.

        Args:
            parameters: matrices, float32.
            precision: of the products.
        """
        self._parameters, self._precision = parameters, precision
        self._means = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move all by their gradients."""
        for name, parameter in self._parameters.items():
            gradient = parameter.grad
            if gradient is None or not bool(gradient.any()):
                continue
            mean = self._means[name].lerp_(gradient, 1 - MOMENTUM)
            step = orthogonal(gradient.lerp(mean, MOMENTUM), self._precision)
            parameter.add_(step, alpha=-rate * SIZE * math.sqrt(max(step.shape)))

    def tensors(self) -> dict[str, Tensor]:
        """The running means."""
        return {f"mean/{name}": mean.detach() for name, mean in self._means.items()}

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up what :meth:`tensors` gave after so many steps."""
        for name, mean in self._means.items():
            mean.copy_(tensors[f"mean/{name}"])


class Adam:
    """AdamW without decay: a product does not change where one part of it shrinks and the other one grows."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Start with nothing behind."""
        self._parameters = parameters
        self._optimiser = torch.optim.AdamW(parameters.values(), lr=0.0, betas=BETAS, weight_decay=0.0)

    def step(self, rate: float) -> None:
        """Move all by their gradients."""
        for group in self._optimiser.param_groups:
            group["lr"] = rate
        self._optimiser.step()

    def tensors(self) -> dict[str, Tensor]:
        """Both moments."""
        return {
            f"{moment}/{name}": self._optimiser.state[parameter][moment]
            for name, parameter in self._parameters.items()
            for moment in MOMENTS
        }

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up what :meth:`tensors` gave after so many steps."""
        for name, parameter in self._parameters.items():
            moments = {moment: tensors[f"{moment}/{name}"].to(parameter.device) for moment in MOMENTS}
            self._optimiser.state[parameter] = {"step": torch.tensor(float(steps)), **moments}


class Optimiser:
    """The parameters with what moves them, as tensors to be saved and given back."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], scales: Collection[str], precision: torch.dtype) -> None:
        """Start with nothing behind.

        Args:
            parameters: all that is trained, float32; the gradients of all are there at every step.
            scales: names of those that are scales.
            precision: of the products of factors' steps.
        """
        self._parameters, self._scales, self._precision = parameters, scales, precision
        self.begin()

    def begin(self) -> None:
        """Forget the past."""
        factors = {name: one for name, one in self._parameters.items() if name not in self._scales}
        scales = {name: one for name, one in self._parameters.items() if name in self._scales}
        muon, adam = Muon(factors, self._precision), [Adam(scales)] if scales else []
        self._parts: Sequence[Muon | Adam] = (muon, *adam)

    def step(self, rate: float) -> None:
        """Move all by their gradients, and free these."""
        for part in self._parts:
            part.step(rate)
        self.forget_gradients()

    def forget_gradients(self) -> None:
        """Free their memory."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, and what is kept of their gradients."""
        found = {f"factor/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for part in self._parts:
            found |= part.tensors()
        return found

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Take up what :meth:`tensors` gave after so many steps."""
        self.begin()
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors[f"factor/{name}"])
        for part in self._parts:
            part.restore(tensors, steps)

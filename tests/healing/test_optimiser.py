"""Steps of factors and scales: against the textbook form, torch's own, and where there is nothing to go by."""

from __future__ import annotations

import pytest
import torch
from support.textbook_muon import orthogonalised
from torch import Tensor, nn

from svdconvert.healing.optimiser import Optimiser, orthogonal

SHAPES = [(8, 40), (40, 8), (24, 24), (1, 16)]


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Wide, tall and square: the polynomial on singular values, and those near 1."""
    matrix = parameter(*shape).detach() * 1e-6
    found = orthogonal(matrix, torch.float32)
    torch.testing.assert_close(found.double(), orthogonalised(matrix), rtol=1e-3, atol=1e-4)
    singular = torch.linalg.svdvals(found)
    assert 0.65 < singular[0] < 1.25
    assert (singular > 0.65).double().mean() > 0.9


@pytest.mark.parametrize("size", [1e-24, 1e-30, 1e-44])
def test_the_smallest_gradients_move_factors_to_numbers(size: float) -> None:
    """Those of an expert that was sent one token, with next to no weight: their squares are 0 in float32."""
    own = parameter(8, 40)
    own.grad = size * parameter(8, 40, seed=1).detach()
    assert own.grad.any()
    Optimiser({"a": own}, (), torch.float32).step(0.1)
    assert torch.isfinite(own).all()
    if size > 1e-40:
        expected = orthogonal(parameter(8, 40, seed=1).detach(), torch.float32) * -0.1 * 0.2 * 40**0.5
        torch.testing.assert_close(own - parameter(8, 40), expected, rtol=1e-3, atol=1e-5)


def test_orthogonal_of_low_rank() -> None:
    """Directions that a gradient does not have are not made up."""
    matrix = parameter(32, 2).detach() @ parameter(2, 24, seed=1).detach()
    singular = torch.linalg.svdvals(orthogonal(matrix, torch.float32))
    assert singular[1] > 0.65
    assert singular[2] < 1e-2


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has none")
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_muon_is_that_of_torch(shape: tuple[int, int]) -> None:
    own, other = parameter(*shape), parameter(*shape)
    ours = Optimiser({"a": own}, (), torch.bfloat16)
    theirs = torch.optim.Muon([other], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        gradient = parameter(*shape, seed=step + 1).detach()
        own.grad, other.grad = gradient.clone(), gradient.clone()
        ours.step(0.02)
        theirs.step()
    torch.testing.assert_close(own, other, rtol=0, atol=1e-3)
    assert (own - parameter(*shape)).abs().mean() > 0.005


def test_steps_are_as_long_as_adams() -> None:
    """In the root mean square, 0.2 of the rate, whatever the gradient and the shape."""
    for shape, size in ((SHAPES[0], 1e-8), (SHAPES[1], 1e3), (SHAPES[2], 1.0)):
        own = parameter(*shape)
        own.grad = size * parameter(*shape, seed=1).detach()
        Optimiser({"a": own}, (), torch.float32).step(0.1)
        moved = (own - parameter(*shape)).square().mean().sqrt().item()
        assert moved == pytest.approx(0.1 * 0.2, rel=0.25)


def test_what_has_no_gradient_does_not_move() -> None:
    """Muon's steps do not grow shorter as a mean fades, so without a gradient there is none."""
    own = parameter(8, 8)
    optimiser = Optimiser({"a": own}, (), torch.float32)
    own.grad = parameter(8, 8, seed=1).detach()
    optimiser.step(0.1)
    before, kept = own.detach().clone(), {name: one.clone() for name, one in optimiser.tensors().items()}
    for gradient in (None, torch.zeros(8, 8)):
        own.grad = gradient
        optimiser.step(0.1)
        assert own.grad is None
        assert torch.equal(own, before)
        assert all(torch.equal(one, kept[name]) for name, one in optimiser.tensors().items())


@pytest.mark.parametrize("scales", [(), ("b",), ("a", "b")])
def test_given_back_it_goes_on_alike(scales: tuple[str, ...]) -> None:
    """Factors alone, both, scales alone; through copies, as a file gives them back."""

    def begun() -> tuple[dict[str, nn.Parameter], Optimiser]:
        parameters = {"a": parameter(6, 10), "b": parameter(12, 1, seed=1)}
        return parameters, Optimiser(parameters, scales, torch.float32)

    def go_on(parameters: dict[str, nn.Parameter], optimiser: Optimiser, steps: range) -> None:
        for step in steps:
            for seed, one in enumerate(parameters.values()):
                one.grad = parameter(*one.shape, seed=10 * step + seed).detach()
            optimiser.step(0.01)

    straight, optimiser = begun()
    go_on(straight, optimiser, range(6))
    broken, optimiser = begun()
    go_on(broken, optimiser, range(3))
    saved: dict[str, Tensor] = {name: one.clone() for name, one in optimiser.tensors().items()}
    resumed, optimiser = begun()
    optimiser.restore(saved, 3)
    go_on(resumed, optimiser, range(3, 6))
    for name, one in straight.items():
        assert torch.equal(one, resumed[name]), name


def test_scales_move_by_adam() -> None:
    own, other = parameter(12, 1), parameter(12, 1)
    optimiser = Optimiser({"s": own}, ("s",), torch.float32)
    theirs = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        own.grad = parameter(12, 1, seed=step).detach()
        other.grad = own.grad.clone()
        optimiser.step(0.01)
        theirs.step()
    assert torch.equal(own, other)

"""What is kept while statistics are collected."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from svdconvert.calibration import grams
from svdconvert.calibration.collector import Collector
from svdconvert.methods.statistics import Needs


class Doubled(nn.Module):
    """Autograd keeps nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_inputs_are_not_kept_for_the_backward_pass() -> None:
    """Weights without gradients need none, and they would be a large part of a block's memory."""
    block = nn.Sequential(nn.Linear(8, 8, bias=False), Doubled(), nn.Linear(8, 8, bias=False)).requires_grad_(False)
    places, seen, alive = {"one": ("0", None), "two": ("2", None)}, list[int](), list[tuple[int, ...]]()
    block[1].register_forward_hook(lambda module, args, output: seen.append(output.data_ptr()))
    # between the last layer's gradient and the first one's
    block[0].register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: alive.extend(_tensors_at(seen[0]))) and None
    )
    with Collector(block, places, Needs(input_gram=True, output_gram=True)) as collector:
        collector.begin(torch.ones(1, 5, dtype=torch.bool))
        output = block(torch.randn(1, 5, 8, requires_grad=True))
        assert _tensors_at(seen[0])
        torch.autograd.backward(output, torch.ones_like(output))
        found = collector.result()
    assert found.keys() == places.keys()
    assert not alive


def _tensors_at(place: int) -> list[tuple[int, ...]]:
    return [tuple(each.shape) for each in gc.get_objects() if type(each) is Tensor and each.data_ptr() == place]


def test_products_have_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are massive: oneDNN keeps a kernel for every size."""
    sizes, multiply = set(), grams.multiply
    monkeypatch.setattr(grams, "multiply", lambda one, other: (sizes.add(one.shape[1]), multiply(one, other))[1])
    gram, generator = grams.GramSum(24, torch.device("cpu")), torch.Generator().manual_seed(0)
    parts = []
    for count in range(200, 264):
        rows = torch.randn(count, 24, generator=generator)
        rows[: count % 7] *= 1e5
        parts.append(rows.double())
        gram.add(rows)
    whole = torch.cat(parts)
    assert torch.allclose(gram.mean(len(whole)), whole.T @ whole / len(whole), rtol=1e-5)
    assert sizes == {224, 256, 288}

"""What goes into a linear layer of a block and comes out of it, while hidden states pass through."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream


@dataclass
class Captured:
    """Values of the tokens that are no padding, float64.

    Attributes:
        input: of the layer, [tokens, in].
        outputs: path of a layer -> what it gives, [tokens, out].
        tokens: of an expert's layer, which tokens of the batch these are, ascending; None where all are.
    """

    input: Tensor = field(default_factory=lambda: torch.empty(0))
    outputs: dict[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None


class _Reached(Exception):
    """Ends a forward pass at the layer in question: nothing behind it is needed, and torch knows no other way out."""


def capture(
    blocks: ModelBlocks,
    block: nn.Module,
    index: int,
    stream: Stream,
    batch: slice,
    path: str,
    others: Sequence[str] = (),
) -> Captured:
    """Run one batch through a block, up to a layer.

    Args:
        blocks: of the model.
        block: the block, with its weights.
        index: its number.
        stream: hidden states that go into it.
        batch: which of them.
        path: the layer, whose input and output are wanted.
        others: layers called before it, whose outputs are wanted as well.
    """
    captured = Captured()

    def keep(name: str, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        section = blocks.place(name)[1]
        part = output if section is None else section.of(output, output.dim() - 1)
        tokens = routing.tokens(name)
        if tokens is not None:
            rows, captured.tokens = stream.counted(tokens, batch)
            captured.outputs[name], captured.input = part[rows].double(), args[0][rows].double()
            raise _Reached
        captured.outputs[name] = stream.tokens(part, batch).double()
        if name == path:
            captured.input = stream.tokens(args[0], batch).double()
            raise _Reached

    with ExitStack() as hooks, torch.no_grad(), blocks.routing(block) as routing:
        for name in (*others, path):
            _hook(hooks, block, blocks.place(name)[0], partial(keep, name))
        try:
            stream.run(block, index, batch)
        except _Reached:
            return captured
        if routing.expert(path) is None:
            raise AssertionError(f"the block does not call {path}")
    return nothing(blocks, block, path)


def nothing(blocks: ModelBlocks, block: nn.Module, path: str) -> Captured:
    """What an expert's layer leaves that no token is sent to."""
    rows, columns = blocks.matrix(block, path).shape
    empty = torch.empty(0, rows + columns, dtype=torch.float64, device=blocks.device)
    outputs = {path: empty[:, :rows]}
    return Captured(empty[:, rows:], outputs, torch.empty(0, dtype=torch.int64, device=blocks.device))


def in_both(one: Captured, other: Captured, path: str) -> tuple[Tensor, Tensor]:
    """Outputs of a layer in the first pass and its inputs in the second, of the tokens that it got in both."""
    outputs, inputs = one.outputs[path], other.input
    if one.tokens is None or other.tokens is None:
        return outputs, inputs
    here, there = torch.isin(one.tokens, other.tokens), torch.isin(other.tokens, one.tokens)
    return outputs[here], inputs[there]


def call_order(blocks: ModelBlocks, block: nn.Module, index: int, stream: Stream, paths: Sequence[str]) -> list[str]:
    """Paths of linear layers in the order in which a block calls them; arguments as of :func:`capture`.

    Experts that the first batch has no token for come last.
    """
    called: list[str] = []
    with ExitStack() as hooks, torch.no_grad():
        for path in paths:
            _hook(hooks, block, blocks.place(path)[0], lambda layer, args, output, path=path: called.append(path))
        stream.run(block, index, stream.batches[0])
    return list(dict.fromkeys([*called, *paths]))


def _hook(hooks: ExitStack, block: nn.Module, path: str, function: Callable[..., None]) -> None:
    handle = block.get_submodule(path).register_forward_hook(function)
    hooks.callback(handle.remove)

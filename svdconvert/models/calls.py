"""The arguments with which a model calls each of its blocks.

Masks, position embeddings and cache positions differ between versions of transformers and, if some blocks have a
sliding window, between blocks. So they are not built here but recorded: the base model's own forward runs with
recorders in the place of its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# What blocks say of their kind, by families and versions.
_KINDS = ("attention_type", "layer_type", "block_type", "is_attention_layer")


@dataclass(frozen=True)
class Call:
    """The arguments of one block.

    Attributes:
        hidden: [batch, length, hidden], the block's input; it is the model's own for the first block only.
        args, kwargs: the other arguments.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def block_output(output: Any) -> Tensor:
    """The hidden states that a block gives: [batch, length, hidden].

    Args:
        output: what its forward returns, a tuple in transformers 4 and the tensor itself in 5.
    """
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


class BlockCalls:
    """The calls of a base model's blocks, recorded by modules in their place."""

    def __init__(self, base: nn.Module, blocks: str, layers: Sequence[nn.Module], device: torch.device) -> None:
        """Put the recorders in.

        Args:
            base: the base model; every module with weights but its blocks must be able to run.
            blocks: path of the list of blocks in it.
            layers: the blocks.
            device: where the model runs.
        """
        self._base, self._count, self._device = base, len(layers), device
        self._calls: list[Call] = []
        self._by_shape: dict[tuple[int, ...], list[Call]] = {}
        recorders = [_Recorder(layer, self._calls) for layer in layers]
        recorders[-1].last = True
        parent, _, name = blocks.rpartition(".")
        setattr(base.get_submodule(parent), name, nn.ModuleList(recorders))

    def of(self, index: int, like: Tensor, mask: Tensor, width: int) -> Call:
        """The call of a block for a batch, except that its hidden states are zeros.

        Args:
            index: the block.
            like: any tensor of the computing type, on the device.
            mask: [batch, length], bool; False is padding. The call depends on it alone.
            width: channels of an embedding.
        """
        inputs = {"inputs_embeds": like.new_zeros(()).expand(*mask.shape, width)}
        if not bool(mask.all()):
            return self.record(inputs, mask)[index]
        key = tuple(mask.shape)
        if key not in self._by_shape:
            self._by_shape = {key: self.record(inputs, mask)}
        return self._by_shape[key][index]

    def record(self, inputs: Mapping[str, Tensor], mask: Tensor) -> list[Call]:
        """The calls of all blocks.

        Args:
            inputs: ``input_ids`` [batch, length] or ``inputs_embeds`` [batch, length, width].
            mask: [batch, length], bool; False is padding.
        """
        self._calls.clear()
        with torch.no_grad(), suppress(_Recorded):
            self._base(**inputs, attention_mask=mask.to(self._device), use_cache=False)
        calls = list(self._calls)
        self._calls.clear()
        assert len(calls) == self._count, "the base model did not call its blocks in their order"
        return calls


class _Recorded(Exception):
    """Raised where the last block would begin, to leave the base model's forward."""


class _Recorder(nn.Module):
    """Takes the place of one block and keeps its arguments."""

    def __init__(self, layer: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls
        # Some versions choose the mask of a block by what it says of its kind.
        for name in _KINDS:
            setattr(self, name, getattr(layer, name, None))
        self.last = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._calls.append(Call(hidden_states, args, kwargs))
        if self.last:
            raise _Recorded
        # A version that expects a tensor passes the tuple on to the next recorder, which ignores it.
        return (hidden_states,)

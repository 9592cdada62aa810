"""What a model calls each of its blocks with.

Masks, position embeddings and cache positions differ from one version of transformers to the next and, where some
blocks have a sliding window, from block to block. So they are not written down here: the base model's own forward is
run with recorders in the place of its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What the base model hands to one of its blocks.

    Attributes:
        hidden: [batch, length, hidden], the block's input; it is the model's own for the first block only.
        args, kwargs: everything else.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class BlockCalls:
    """The calls of a base model's blocks, recorded by stand-ins that take their place in it."""

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
        """What a block is called with for a batch, but for the hidden states, which are zeros.

        Args:
            index: the block.
            like: any tensor of the type that is computed in, on the device.
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
        """What each block is called with.

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
    """Leaves the base model's forward where its last block would begin."""


class _Recorder(nn.Module):
    """Stands in for one block and keeps what it is called with."""

    def __init__(self, layer: nn.Module, calls: list[Call]) -> None:
        super().__init__()
        self._calls = calls
        # Some versions choose a block's mask by it.
        self.attention_type = getattr(layer, "attention_type", None)
        self.last = False

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        self._calls.append(Call(hidden_states, args, kwargs))
        if self.last:
            raise _Recorded
        # A version that wants a tensor takes the tuple on to the next recorder, which does not look at it.
        return (hidden_states,)

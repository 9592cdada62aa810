"""The compressed model in memory, of which factors and scales alone are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svdconvert.families.table import factored_architecture
from svdconvert.healing.precision import computing
from svdconvert.healing.trained import Trained
from svdconvert.models.calls import block_output
from svdconvert.models.head import Logits, whole_head
from svdconvert.models.loading import load_model
from svdconvert.storage.source import LocalSource


class Student(Trained):
    """A factored model, in float32; integers of weights that are on grids stay integers.

    Its blocks keep their inputs alone for the backward pass, and are run again in it.

    Attributes:
        head: what makes predictions of :meth:`hidden`.
    """

    def __init__(self, source: LocalSource, device: str, precision: torch.dtype) -> None:
        """Load it.

        Args:
            source: the factored checkpoint.
            device: where it is run.
            precision: of the matrix products.

        Raises:
            InputError: it cannot be loaded.
        """
        row = factored_architecture(source.config, source.where)
        model: Any = load_model(source.folder, device, torch.float32)
        model.requires_grad_(False)
        self.device, self._precision = torch.device(device), precision
        self._base: nn.Module = model.base_model
        output = model.get_output_embeddings()
        self.head = whole_head(nn.Sequential(output, Logits(row.pieces.logits, model.config)), output.weight.shape[0])
        self._blocks = [*self._base.get_submodule(row.pieces.blocks).children()]
        for block in self._blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        super().__init__(source, model)

    def hidden(self, ids: Tensor, mask: Tensor) -> Tensor:
        """What goes into the head: [batch, length, width] float32, differentiable by what is trained.

        Args:
            ids, mask: [batch, length], int64 and bool; False is padding.
        """
        ids, mask = ids.to(self.device), mask.to(self.device)
        with computing(self.device, self._precision):
            output = self._base(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden.float()

    def hidden_behind(self, ids: Tensor, mask: Tensor, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """What :meth:`hidden` gives, and the outputs of some blocks by the way, [batch, length, hidden] float32 each.

        Args:
            ids, mask: as there.
            indices: of the blocks, in rising order.
        """
        found = list[Tensor]()

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            found.append(block_output(output).float())

        hooks = [self._blocks[index].register_forward_hook(keep) for index in indices]
        try:
            return self.hidden(ids, mask), found
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def computing_in(self, precision: torch.dtype) -> Iterator[None]:
        """Context in which the matrix products are of another type."""
        own, self._precision = self._precision, precision
        try:
            yield
        finally:
            self._precision = own

"""Which tokens of a batch each expert of a block gets."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.families.experts import Experts


class Routing:
    """Watches the router of a block. Use as a context manager, and run the block inside.

    A block without one, or with one MLP for all tokens, has no experts: every layer gets all tokens.
    """

    def __init__(self, block: nn.Module, experts: Experts | None, choices: int) -> None:
        """Prepare.

        Args:
            block: that will be run.
            experts: of its family; None if there are none.
            choices: experts that a token passes.
        """
        self._block, self._experts, self._choices = block, experts, choices
        self._chosen = torch.zeros(0, choices, dtype=torch.int64)
        self._handles: list[Any] = []

    def __enter__(self) -> Routing:
        """Set the hook."""
        if self._experts is not None:
            router = f"{self._experts.mixture}.{self._experts.router}"
            module = dict(self._block.named_modules()).get(router)
            # a dense MLP may have a layer of another name there
            if module is not None:
                self._handles.append(module.register_forward_hook(self._note))
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the hook."""
        for handle in self._handles:
            handle.remove()

    def expert(self, path: str) -> int | None:
        """The expert that a layer of the block belongs to, by the layer's path; None outside of experts."""
        if self._experts is None:
            return None
        match = re.match(rf"{re.escape(self._experts.mixture)}\.experts\.(\d+)\.", path)
        return int(match[1]) if match else None

    def has_own_inputs(self, path: str) -> bool:
        """Whether inputs of an expert's layer are inner channels of that expert, and so are no other's."""
        assert self._experts is not None
        return path.endswith(f".{self._experts.names[-1]}")

    def tokens(self, path: str) -> Tensor | None:
        """Positions in the batch, flattened, of the rows that a layer was called with last; None for all in order."""
        expert = self.expert(path)
        if expert is None:
            return None
        # in the order of both versions of transformers: first choices first
        chosen: Tensor = (self._chosen == expert).t().flatten().nonzero()[:, 0]
        return chosen % len(self._chosen)

    def _note(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, tuple):  # logits, weights, choices in transformers 5; where 4 has several, choices last
            self._chosen = output[-1]
        else:
            self._chosen = output.detach().softmax(-1, dtype=torch.float).topk(self._choices, dim=-1).indices

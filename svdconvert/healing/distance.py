"""How far hidden states of the compressed model are from the dense model's, and where they are compared.

Predictions alone say little about what each block should do. Hidden states by the way say it for each of their channels
(Romero et al., arXiv:1412.6550; after pruning Muralidharan et al., arXiv:2407.14679). The compressed model has the same
width, so no map between both is to be learned. The states of a few depths fit on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Depths at which states are compared.
DEPTHS = 4


def compared_blocks(count: int) -> tuple[int, ...]:
    """The blocks whose outputs are compared, evenly spaced, of so many: the last one is at nine tenths.

    What comes after it is judged by the predictions.
    """
    return tuple(sorted({9 * place * count // (10 * DEPTHS) for place in range(1, DEPTHS + 1)}))


def distances(found: Tensor, wanted: Tensor) -> Tensor:
    """||y - y'||^2 / ||y||^2 of each token, [n] float32.

    Each token counts the same: the states of a few, the first one above all, are far longer than all others.

    Args:
        found, wanted: y' and y, [n, hidden], of any floating type.
    """
    wanted = wanted.float()
    return (found.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-30)


@dataclass(frozen=True)
class Hints:
    """What is minimised beside the divergence of predictions: the mean distance of hidden states, times a weight.

    Attributes:
        weight: of it.
        blocks: whose outputs are compared, in rising order.
    """

    weight: float = 0.0
    blocks: Sequence[int] = ()

    def sum(self, found: Sequence[Tensor], wanted: Sequence[Tensor], mask: Tensor) -> Tensor:
        """The weighted distances, summed over tokens, averaged over blocks: a scalar.

        Args:
            found, wanted: outputs of the compressed and of the dense model's blocks, [batch, length, hidden] each.
            mask: [batch, length], bool, on their device; False is padding.
        """
        each = [distances(own[mask], other[mask]).sum() for own, other in zip(found, wanted, strict=True)]
        return self.weight * torch.stack(each).mean()


# Predictions alone.
NO_HINTS = Hints()

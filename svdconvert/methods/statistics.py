"""The statistics that methods use: of a layer's inputs and of the gradients of its outputs."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Needs:
    """Which statistics to collect."""

    input_gram: bool = False
    output_gram: bool = False
    input_abs: bool = False
    fisher: bool = False

    @property
    def gradients(self) -> bool:
        """Whether gradients of the loss are needed."""
        return self.output_gram or self.fisher


@dataclass(frozen=True)
class ModuleStatistics:
    """Statistics of a linear layer with ``in`` inputs and ``out`` outputs; None for those that were not collected.

    Attributes:
        input_gram: E[x x^T], [in, in], float64, on the device that collected it, or, of several processes and from
            files, on the CPU. One object for layers that read the same input.
        output_gram: E[g g^T], [out, out], likewise.
        input_abs: E|x|, [in], float64, CPU. One object for layers that read the same input.
        fisher: [in], float64, CPU.
        tokens: tokens that the means over tokens are over: all that are not padding, the last of a sequence included,
            at which g is zero.
        samples: number of sequences in the mean of ``fisher``.
    """

    input_gram: Tensor | None
    output_gram: Tensor | None
    input_abs: Tensor | None
    fisher: Tensor | None
    tokens: int
    samples: int


STATISTICS = tuple(field.name for field in fields(Needs))

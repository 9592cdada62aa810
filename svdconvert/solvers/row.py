"""What a solver is. No torch before it solves, since a plan reads these rows too."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from svdconvert.linalg.panels import Workspace
    from svdconvert.linalg.results import Factors


class Solver(ABC):
    """A way to compute a truncated SVD without metrics.

    Attributes:
        name: as on the command line.
        eigenproblem: its cost beside the Gram matrix, times k^3 floating-point operations of a matrix product, k the
            smaller side; measured roughly, since splitting work among processes needs no more.
        single_plain_only: whether it is for plain SVD of single matrices alone, so that a request for anything else is
            refused with it.
        cpu_only: where it solves on the CPU alone, why; the default solver takes its place on a GPU.
    """

    name: ClassVar[str]
    eigenproblem: ClassVar[float]
    single_plain_only: ClassVar[bool]
    cpu_only: ClassVar[str] = ""

    @abstractmethod
    def acts(self, shape: tuple[int, int], rank: int) -> bool:
        """Whether it takes the default solver's place on a matrix.

        Args:
            shape: of the matrix.
            rank: of the product.
        """

    @abstractmethod
    def factorize(self, weight: Tensor, rank: int, dtype: torch.dtype, workspace: Workspace) -> Factors:
        """Two balanced factors of a matrix.

        Args:
            weight: [m, n], any floating type, on the device that is to do the work.
            rank: 1 <= rank <= min(m, n).
            dtype: storage type of the factors.
            workspace: buffers to reuse between calls.

        Returns:
            The factors, with a certificate where they are not the best ones.

        Raises:
            InputError: the matrix has NaN or infinite entries, or the factors do not fit the storage type.
        """

    def planned(self, count: int, of: int) -> str | None:
        """A note for a plan; None where there is nothing to say.

        Args:
            count: matrices that it is tried on.
            of: all that are factored.
        """
        return None

    def done(self, matrices: Sequence[Mapping[str, Any]]) -> str | None:
        """What became of the matrices, in words; None where there is nothing to say.

        Args:
            matrices: of svdconvert.json, see :class:`svdconvert.factoring.matrix_report.MatrixReport`.
        """
        return None

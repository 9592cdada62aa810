"""How much memory a conversion and a fine-tuning take, estimated from shapes alone.

Where the model is run on a text, ``planning/text_memory.py`` says what that takes. The counts of arrays below follow
the code that makes them (``linalg/exact.py``, ``jobs/pipeline.py``); what they leave out, a process with torch in it,
was measured (docs/measurements.md, which also compares the estimate with the peak).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from svdconvert.models.head_sizes import HEAD_BYTES

FLOAT32, FLOAT64 = 4, 8  # bytes

# A Python process with torch and transformers loaded, and gaps between small pieces of memory, measured.
BASE_BYTES = 450_000_000
# Results whose weights in float32 and files are below it are loaded whole to be checked (models/probe.py).
LOADED_BYTES = 500_000_000
# A tensor is copied in pieces of so many bytes, and one that is stored by columns is turned round in such (both
# storage/reader.py).
READ_BYTES = TURNED_BYTES = 2**22

# Full fine-tuning with AdamW: weight, gradient and two moments in float32; activations come on top of it.
TRAINING_BYTES_PER_PARAMETER = 4 * FLOAT32

# On the CPU, [k, k] in float32 for a smaller side k: the Gram matrix, its eigenvectors and LAPACK's workspace.
SQUARES = 3
# On the CPU, [k, r] in float32: the smaller factor and its inverse, each with a copy.
FACTORS = 4
# On the CPU, [r, r] in float32: overlaps of that factor's columns, and what is made of them.
OVERLAPS = 3
# On the CPU, in float32, for so many rows (or columns) of the matrix at a time (linalg/panels.py): these, and so many
# times the larger factor's (linalg/partner.py).
PANEL, PANEL_FACTORS = 1024, 3
# Results that wait to be written, beside the matrix that is read ahead: the queue of `jobs/pipeline.py`.
WAITING_RESULTS = 2
# Of layers that share a factor, [n, n] and [n, r] in float64 for n inputs where they have metrics: the decomposition, a
# layer's metric and what is made of it, and the rows of the shared factor in several forms (linalg/shared.py).
METERED_SQUARES, METERED_FACTORS = 5, 7
# In float64, for so many rows of a layer at a time: these are compared with their product (linalg/residual.py). And
# what pieces of memory that come and go with each layer leave between them, measured.
COMPARED_ROWS, COMPARED, LAYER_GAPS = 256, 4, 32_000_000
# The same of a group that is decomposed.
GROUPED_SQUARES = 9

# On a GPU each worker has one matrix in work and has begun with another: copies of the source's matrix, of results,
# and [k, k] in float64, which is used where float32 is not enough: Gram matrix, eigenvectors and workspace.
GPU_MATRICES, GPU_RESULTS, GPU_SQUARES = 3, 2, 5

# A decomposition keeps copies of the larger Gram matrix in float64; on a GPU, torch's solver has a workspace of its
# own, and so have products of metrics.
DECOMPOSITION_SQUARES, GPU_DECOMPOSITION_SQUARES = 3, 9

# Rounding to few bits with feedback, in float64: the inputs' metric, its factor and what is made of them, the outputs'
# metric, and copies of the matrix.
ROUNDED_INPUTS, ROUNDED_OUTPUTS, ROUNDED_COPIES = 6, 2, 8


@dataclass(frozen=True)
class SolvedMatrix:
    """A matrix that is to be factored.

    Attributes:
        side: the smaller side k.
        long: the longer side.
        rank: rank r.
        read: bytes of the source's tensors.
        written: bytes of the result's.
    """

    side: int
    long: int
    rank: int
    read: int
    written: int


@dataclass(frozen=True)
class SolvedGroup:
    """Matrices that share a factor. Memory does not depend on how many there are, unless all have few rows.

    Attributes:
        columns: inputs n.
        rows: of the tallest matrix.
        stacked: rows of all of them, if they are fewer than there are columns; else 0.
        rank: rank r.
        read: bytes of the largest of the source's tensors.
        written: bytes of the largest factor that a matrix has of its own.
        shared: bytes of the shared factor.
        metered: whether they have metrics.
    """

    columns: int
    rows: int
    stacked: int
    rank: int
    read: int
    written: int
    shared: int
    metered: bool


@dataclass(frozen=True)
class CopiedTensor:
    """A tensor that is copied.

    Attributes:
        read: its bytes in the source.
        written: its bytes in the result.
        turned: whether the source has it by columns; it is read as a whole then.
        converted: whether the result has it in another type.
    """

    read: int
    written: int
    turned: bool
    converted: bool


def host_bytes(
    matrices: Sequence[SolvedMatrix],
    workers: int,
    copied: Iterable[CopiedTensor] = (),
    groups: Iterable[SolvedGroup] = (),
) -> int:
    """Estimated peak of host memory when solving on the CPU.

    Args:
        matrices: all of a job.
        workers: how many are in work at the same time.
        copied: what is copied meanwhile, one after the other.
        groups: all of the job.
    """
    buffers = (workers + 1) * max((matrix.read for matrix in matrices), default=0)
    solving = [WAITING_RESULTS * matrix.written + workers * _on_host(matrix) for matrix in matrices]
    solving += [WAITING_RESULTS * group.written + workers * _of_group(group) for group in groups]
    return BASE_BYTES + buffers + max(solving, default=0) + max(map(_copying, copied), default=0)


def device_bytes(matrices: Iterable[SolvedMatrix], workers: int, groups: Iterable[SolvedGroup] = ()) -> int:
    """Estimated peak of a GPU's memory when solving on one. Arguments as of :func:`host_bytes`."""
    solving = [_on_device(matrix, workers) for matrix in matrices]
    return max([*solving, *(workers * _of_group(group, GPU_SQUARES * FLOAT64) for group in groups)], default=0)


def decomposition_bytes(sides: Iterable[int], workers: int, *, on_gpu: bool = False) -> int:
    """Estimated memory of decompositions, on the host or a GPU.

    Args:
        sides: of each matrix, the larger side if it has metrics, else the smaller one.
        workers: how many are in work at the same time.
        on_gpu: whether a GPU's memory is meant.
    """
    squares = GPU_DECOMPOSITION_SQUARES if on_gpu else DECOMPOSITION_SQUARES
    return workers * squares * FLOAT64 * max(sides) ** 2


def group_decomposition_bytes(columns: int) -> int:
    """Estimated memory of decomposing matrices with so many columns that share a factor, in their metrics."""
    return GROUPED_SQUARES * FLOAT64 * columns**2


def rounding_bytes(shapes: Iterable[tuple[int, int]], workers: int) -> int:
    """Estimated memory of rounding matrices to few bits in their metrics, on the host or a GPU.

    Args:
        shapes: ``(out, in)`` of each.
        workers: how many are in work at the same time.
    """
    entries = (
        ROUNDED_INPUTS * columns**2 + ROUNDED_OUTPUTS * rows**2 + ROUNDED_COPIES * rows * columns
        for rows, columns in shapes
    )
    return workers * FLOAT64 * max(entries, default=0)


def check_bytes(parameters: int, file_bytes: int, block: int) -> int:
    """Estimated peak of host memory while a result is checked: loaded if it is small, else run block by block.

    Args:
        parameters: of the result.
        file_bytes: of its weight files.
        block: parameters that are there at a time then: of the largest block, with one expert of a mixture.
    """
    needed = FLOAT32 * parameters + file_bytes
    return BASE_BYTES + (needed if needed <= LOADED_BYTES else FLOAT32 * block + 2 * HEAD_BYTES + READ_BYTES)


def training_bytes(parameters: int) -> int:
    """Memory of weights, gradients and optimiser for full fine-tuning; no activations."""
    return parameters * TRAINING_BYTES_PER_PARAMETER


def _on_host(matrix: SolvedMatrix) -> int:
    """Of a worker, but for what it reads."""
    k, r = matrix.side, matrix.rank
    numbers = SQUARES * k * k + FACTORS * k * r + OVERLAPS * r * r
    numbers += min(PANEL, matrix.long) * (k + PANEL_FACTORS * r)
    return matrix.written + FLOAT32 * numbers


def _of_group(group: SolvedGroup, square: int = SQUARES * FLOAT32) -> int:
    """Of a worker.

    Args:
        group: in work.
        square: bytes for each entry of a Gram matrix without metrics.
    """
    n, m, r = group.columns, group.rows, group.rank
    needed = group.read + group.written + group.shared + LAYER_GAPS
    needed += FLOAT64 * min(COMPARED_ROWS, m) * (COMPARED * n + r)
    if group.metered:
        return needed + FLOAT64 * (METERED_SQUARES * n * n + METERED_FACTORS * n * r + OVERLAPS * r * r + m * r)
    side = group.stacked or n
    needed += square * side * side + FLOAT32 * (FACTORS * side * r + OVERLAPS * r * r + min(PANEL, m) * n + m * r)
    return needed + FLOAT64 * n * r + FLOAT32 * 2 * group.stacked * n


def _copying(tensor: CopiedTensor) -> int:
    share = min(READ_BYTES / max(tensor.read, 1), 1.0)
    pieces = share * (tensor.read + tensor.converted * tensor.written)
    return int(pieces) + (tensor.read + TURNED_BYTES if tensor.turned else 0)


def _on_device(matrix: SolvedMatrix, workers: int) -> int:
    squares = GPU_SQUARES * FLOAT64 * matrix.side**2
    return matrix.read + workers * (GPU_MATRICES * matrix.read + GPU_RESULTS * matrix.written + squares)

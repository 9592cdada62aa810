"""Which experts of a block have their statistics in memory at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

# Sums of products of a matrix's inputs, and of its gradients, are in float64.
_WIDTH = 8
# Experts whose sums take more together, in bytes, are taken in groups that do not, or one by one; on the CPU and on
# other devices.
ON_CPU, ON_DEVICE = 2**29, 2**33
# Experts of a block whose weights take more, in bytes, are read one at a time, on the CPU.
WEIGHTS_ON_CPU = 2**29


def bound_on(device: str) -> int:
    """Bytes of sums that are in memory together.

    Args:
        device: its type, ``cpu`` or another.
    """
    return ON_CPU if device == "cpu" else ON_DEVICE


def sums_bytes(shapes: Mapping[str, tuple[int, int]], own_inputs: str, *, input_grams: bool, output_grams: bool) -> int:
    """Bytes that the sums of an expert's layers take; layers that read the same share those of their inputs.

    Args:
        shapes: layer -> (out, in).
        own_inputs: the name of the layer that reads channels of the expert's own; others read hidden states.
        input_grams, output_grams: whether products of inputs are summed up, and of gradients.
    """
    inputs = {name.endswith(f".{own_inputs}"): columns for name, (_, columns) in shapes.items()}
    numbers = sum(columns**2 for columns in inputs.values()) if input_grams else 0
    return _WIDTH * (numbers + (sum(rows**2 for rows, _ in shapes.values()) if output_grams else 0))


def in_groups(sizes: Iterable[int], bound: int) -> list[list[int]]:
    """Places of things that follow one another, in groups that take at most ``bound``, or one by one.

    Args:
        sizes: what each of them takes.
        bound: of a group.
    """
    groups: list[list[int]] = []
    room = 0
    for place, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = bound
        groups[-1].append(place)
        room -= size
    return groups

"""Dividing planned work among processes by its cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from svdconvert.planning.steps import Step
from svdconvert.solvers.table import DEFAULT_SOLVER, SOLVERS

_T = TypeVar("_T")

# Floating-point operations in whose time a byte is copied or multiplied out; measured roughly, since a split needs no
# more.
_PER_BYTE = 100


def matrix_cost(shape: tuple[int, int], solver: str = DEFAULT_SOLVER.name) -> float:
    """Cost of decomposing a matrix: its Gram matrix and the eigenproblem of the smaller side k."""
    m, n = shape
    k = min(m, n)
    return float(k) * (m * n + SOLVERS[solver].eigenproblem * k * k)


def step_cost(step: Step) -> float:
    """Cost of a step, in the units of :func:`matrix_cost`."""
    if step.kind == "factorize":
        rows, columns = step.inputs[0].shape
        return matrix_cost((rows, columns), step.options.get("solver", DEFAULT_SOLVER.name))
    return float(_PER_BYTE * sum(info.nbytes for info in (*step.inputs, *step.outputs)))


def split(things: Sequence[_T], parts: int, cost: Callable[[_T], float]) -> list[list[_T]]:
    """Split work into parts of about the same cost: the dearest first, each to the part with the least so far.

    (Graham, 1969: at most 4/3 of the best possible longest part.) The same input always gives the same parts; within
    each, the order is kept.

    Args:
        things: pieces of work.
        parts: number of parts.
        cost: cost of a piece.
    """
    loads = [0.0] * parts
    chosen: list[list[int]] = [[] for _ in range(parts)]
    costs = [cost(thing) for thing in things]
    for index in sorted(range(len(things)), key=lambda i: (-costs[i], i)):
        part = min(range(parts), key=lambda p: (loads[p], p))
        loads[part] += costs[index]
        chosen[part].append(index)
    return [[things[index] for index in sorted(indices)] for indices in chosen]


def split_steps(steps: Sequence[Step], parts: int, *, whole_files: bool = False) -> list[list[Step]]:
    """Split a job's steps.

    Args:
        steps: the steps that are left.
        parts: number of parts.
        whole_files: keep steps together that read the same source file, so that no file is fetched twice.
    """
    if parts == 1:
        return [list(steps)]
    if not whole_files:
        return split(steps, parts, step_cost)
    groups = _by_files(steps)
    shares = split(groups, parts, lambda group: sum(map(step_cost, group)))
    order = {step.key: i for i, step in enumerate(steps)}
    return [sorted((step for group in part for step in group), key=lambda step: order[step.key]) for part in shares]


def _by_files(steps: Sequence[Step]) -> list[list[Step]]:
    """Steps grouped so that no two groups read from one file."""
    groups: list[tuple[set[str], list[Step]]] = []
    for step in steps:
        files, together = set(step.files), [step]
        apart = []
        for group in groups:
            if group[0] & files:
                files |= group[0]
                together = group[1] + together
            else:
                apart.append(group)
        groups = [*apart, (files, together)]
    return [members for _, members in groups]

"""Steps that are done together: on a GPU, small matrices of one shape as a stack, begun without waiting for it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from svdconvert.factoring.operations import layout_of_step, matrices, matrix_report, run
from svdconvert.linalg.panels import Workspace
from svdconvert.linalg.results import Truncation
from svdconvert.linalg.stacked import factorize_stack, settle
from svdconvert.machine.lanes import Lanes
from svdconvert.planning.steps import Step
from svdconvert.storage.reader import torch_dtype

# Matrices up to this smaller side are stacked, as far as their bytes go: beyond, one of them keeps a GPU busy.
STACK_SIDE = 1024
STACK_BYTES = 64 * 2**20

# What a step gives: its output tensors, contiguous on the CPU, and what to record about it.
Result = tuple[list[Tensor], dict[str, Any]]
Finish = Callable[[], list[Result]]


def in_units(steps: Sequence[Step], device: torch.device) -> list[tuple[Step, ...]]:
    """Steps in their order, but for those that join an earlier one of their kind.

    Only steps that read the same files come together, so that no file is held for longer.
    """
    units: list[list[Step]] = []
    growing: dict[Hashable, list[Step]] = {}
    for step in steps:
        key = _stack_key(step) if is_stacked(step, device) else None
        unit = growing.get(key) if key is not None and min(step.inputs[0].shape) <= STACK_SIDE else None
        if unit is not None and sum(s.inputs[0].nbytes for s in unit) + step.inputs[0].nbytes <= STACK_BYTES:
            unit.append(step)
            continue
        units.append([step])
        if key is not None:
            growing[key] = units[-1]
    return [tuple(unit) for unit in units]


def begin(unit: Sequence[Step], inputs: Sequence[Sequence[Tensor]], workspace: Workspace, lanes: Lanes) -> Finish:
    """Begin the steps of a unit.

    Args:
        unit: from :func:`in_units`, no copies.
        inputs: tensors of each step, on the device.
        workspace: buffers of the calling thread.
        lanes: of the device.

    Returns:
        What gives the results, when they are needed: in the same thread, and not later than those of a second unit
        that was begun after it.

    Raises:
        InputError: a tensor has NaN or infinite entries, or does not fit its type; the message names it. So does the
            function that is returned.
    """
    if is_stacked(unit[0], inputs[0][0].device):
        return begin_stack(unit, inputs, workspace, lanes)
    results = [run(step, tensors, workspace) for step, tensors in zip(unit, inputs, strict=True)]
    return lambda: results


def begin_stack(unit: Sequence[Step], inputs: Sequence[Sequence[Tensor]], workspace: Workspace, lanes: Lanes) -> Finish:
    """:func:`begin` of steps that are done as a stack."""
    weights = [matrices(tensors, step)[0] for step, tensors in zip(unit, inputs, strict=True)]
    stack = torch.stack(weights) if len(weights) > 1 else weights[0][None]
    found = factorize_stack(stack, unit[0].options["rank"], torch_dtype(unit[0].outputs[0].dtype))
    leaving = lanes.download([found.down, found.up, found.facts])

    def finish() -> list[Result]:
        downs, ups, facts = leaving.wait()
        finished: list[Result] = []
        for i, factors in enumerate(settle(stack, found, facts)):
            if factors is None:
                finished.append(run(unit[i], inputs[i], workspace))
            else:
                truncation = Truncation.of_factors(factors, [downs[i], ups[i]])
                finished.append((truncation.tensors, matrix_report(unit[i], weights[i], truncation).to_json()))
        return finished

    return finish


def is_stacked(step: Step, device: torch.device) -> bool:
    """Whether a step is done as (part of) a stack: the CPU's own routines are faster there."""
    return device.type != "cpu" and _stack_key(step) is not None


def _stack_key(step: Step) -> Hashable | None:
    """Steps of one key can be done as a stack; None for those of other kinds."""
    if step.kind != "factorize" or not layout_of_step(step).two_factors:
        return None
    (info,) = step.inputs
    options = (step.options["rank"], bool(step.options.get("transposed")))
    return (step.files, info.shape, info.dtype, *options, step.outputs[0].dtype)

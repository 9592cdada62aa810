"""The experts of a stock model whose files have them stacked alone, put together from steps for each expert."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from svdconvert.errors import InputError
from svdconvert.families.experts import Experts
from svdconvert.families.table import Architecture
from svdconvert.planning.steps import Step, in_order
from svdconvert.storage.source import Source


def stacked(steps: Sequence[Step], source: Source, row: Architecture) -> list[Step]:
    """Steps that each make one dense tensor, those of an expert's with all other experts' of their kind as one.

    A stack is in memory as a whole, with the tensors that it is made of.

    Args:
        steps: of the job.
        source: the factored checkpoint.
        row: its architecture.

    Raises:
        InputError: an expert is missing, or is of another size than the first.
    """
    experts = row.experts
    if experts is None or not experts.stacked_alone:
        return list(steps)
    of_expert = re.compile(rf"(.*\.){re.escape(experts.mixture)}\.experts\.(\d+)\.(\w+)\.(weight|bias)")
    names = {parts[-1]: stack for stack, parts in experts.stacks.items()}
    in_files = {own: stored for stored, own in experts.files.items()}
    beside = re.compile(rf"(.*\.{re.escape(experts.mixture)}\.)(.*)")
    others, stacks = [], dict[str, dict[int, Step]]()
    for step in steps:
        match = of_expert.fullmatch(step.outputs[0].name)
        if match is None or match[3] not in names:
            match = beside.fullmatch(step.outputs[0].name)
            stored = in_files.get(match[2]) if match else None
            others.append(_named(step, f"{match[1]}{stored}") if match and stored else step)
            continue
        within = f"experts.{names[match[3]]}{'_bias' if match[4] == 'bias' else ''}"
        own = f"{match[1]}{experts.mixture_5}.{in_files.get(within, within)}"
        stacks.setdefault(own, {})[int(match[2])] = step
    return in_order([*others, *(_stack_step(name, found, source, experts) for name, found in stacks.items())])


def _named(step: Step, name: str) -> Step:
    """A step that makes one tensor, by another name."""
    (info,) = step.outputs
    return replace(step, outputs=(replace(info, name=name),))


def _stack_step(name: str, found: dict[int, Step], source: Source, experts: Experts) -> Step:
    count = experts.count(source.config)
    for number in range(count):
        if number not in found:
            raise InputError(f"{source.where} lacks a part of {name}, that of expert {number}; convert the model again")
    steps = [found[number] for number in range(count)]
    outputs = [step.outputs[0] for step in steps]
    first = outputs[0]
    for info in outputs:
        if info.shape != first.shape:
            raise InputError(
                f"{info.name} of {source.where} has the shape {list(info.shape)}, and {first.name} "
                f"{list(first.shape)}; convert the model again"
            )
    codes = {info.dtype for info in outputs}
    stack = replace(
        first,
        name=name,
        shape=(count, *(reversed(first.shape) if experts.transposed else first.shape)),
        dtype=first.dtype if len(codes) == 1 else "F32",
    )
    inputs = tuple(info for step in steps for info in step.inputs)
    told = [{"kind": step.kind, "inputs": len(step.inputs), "options": dict(step.options)} for step in steps]
    return Step("stack", name, inputs, (stack,), {"transposed": experts.transposed, "parts": told})

"""The steps of a conversion: one per tensor of the source, or per group of layers that share a factor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from svdconvert.families.table import Architecture
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import layout_named
from svdconvert.names import natural
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.settings.conversion import Conversion
from svdconvert.solvers.table import SOLVERS
from svdconvert.tensors import CODES, TensorInfo


def conversion_steps(
    tensors: Mapping[str, TensorInfo],
    targets: Sequence[Target],
    row: Architecture,
    config: Mapping[str, Any],
    request: Conversion,
    files: Mapping[str, Mapping[str, Any]],
) -> list[Step]:
    """Steps in the order of the source's files, so that each file is needed once.

    A group's step comes where its last tensor is read.

    Args:
        tensors: of the source, fused projections in parts where they are split.
        targets: all targets, with their ranks.
        row: the source's architecture.
        config: the source's config.json.
        request: what is asked for.
        files: module path -> further options of its step: the files of its decomposition or of its refitted factors,
            where there are such.
    """
    dtype, layout = request.output.dtype, layout_named(request.recipe.layout)
    solver = SOLVERS[request.recipe.solver]
    factored = {part.weight: target for target in targets if target.rank is not None for part in target.parts}
    factored_biases = {weight.removesuffix("weight") + "bias" for weight in factored}
    owners = factored | {target.weight: target for target in targets if target.rounded}
    unread = {target.weight: len(target.parts) for target in owners.values()}
    steps = []
    full = row.full_names(tensors, config)
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].start, natural(item[0]))):
        code = info.dtype if dtype == "keep" else CODES[dtype]
        if name in owners:
            target = owners[name]
            unread[target.weight] -= 1
            if not unread[target.weight]:
                options = dict(files.get(target.module, {}))
                if target.rounded:
                    steps.append(_rounding_step(info, target, row, code, layout, options))
                    continue
                if solver.acts(target.shape, target.rank or 0):
                    options["solver"] = solver.name
                steps.append(_factor_step(tensors, target, row, code, layout, options))
            continue
        renamed = layout.bias_name(full[name]) if name in factored_biases else row.factored_name(full[name])
        copied = replace(info, name=renamed, dtype=code, file="", start=-1, cut=None)
        steps.append(Step("copy", name, (info,), (copied,)))
    return steps


def _factor_step(
    tensors: Mapping[str, TensorInfo],
    target: Target,
    row: Architecture,
    code: str,
    layout: Layout,
    options: Mapping[str, Any],
) -> Step:
    """Weights of a target -> the tensors of its layout; of a group, the shared one first, then one for each layer."""
    rank = target.rank
    assert rank is not None
    inputs = tuple(tensors[part.weight] for part in target.parts)
    # all but the first tensor of a layout belong to the layer itself
    names = [f"{row.prefix}{part.module}.weight" for part in target.parts]
    shapes = [(part.rows, target.shape[1]) for part in target.parts]
    outputs = [layout.tensors(name, rank, shape, code) for name, shape in zip(names, shapes, strict=True)]
    stored = (*outputs[0], *(info for infos in outputs[1:] for info in infos[1:]))
    kind = "refit" if "refitted" in options else "truncate" if "decomposition" in options else "factorize"
    kind += "_shared" if target.followers else ""
    settings = {"rank": rank, "layout": layout.name, **({"transposed": True} if target.transposed else {})}
    return Step(kind, target.weight, inputs, stored, {**settings, **options})


def _rounding_step(
    info: TensorInfo, target: Target, row: Architecture, code: str, layout: Layout, options: Mapping[str, Any]
) -> Step:
    """The weight of a single matrix -> its weights of few bits."""
    settings = {
        "rank": target.rank,
        "layout": layout.name,
        "grids": [None if grid is None else [grid.bits, grid.group] for grid in target.grids],
    }
    stored = target.tensors(f"{row.prefix}{target.module}.weight", code)
    return Step("round", target.weight, (info,), stored, {**settings, **options})

"""Back to the stock architecture: every product multiplied out, for engines without remote code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from svdconvert.commands.dense_experts import stacked
from svdconvert.commands.rewriting import Layer, Rewriting, factored_steps, rewrite
from svdconvert.errors import InputError
from svdconvert.families.fused import split_layers
from svdconvert.families.table import Architecture, factored_architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Outcome
from svdconvert.layouts.row import Layout
from svdconvert.layouts.table import layout_of
from svdconvert.names import suffix
from svdconvert.paths import path_or_text
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, in_order
from svdconvert.planning.whole import whole_steps
from svdconvert.storage.opening import open_source
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo
from svdconvert.words import listing, parse_size


def densify(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    check: bool = True,
    events: Events | None = None,
) -> Outcome:
    """Multiply the factors out and write a checkpoint of the stock architecture.

    The result computes the same function in as many parameters as the dense source had.

    Args:
        model: folder of a factored checkpoint.
        out: folder to write.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        overwrite: replace what the folder holds.
        check: run a few tokens through the result afterwards and check its logits.
        events: receiver of progress.

    Raises:
        InputError: the model or the folder cannot be used.
        JobError: it broke off; the same call continues it.
    """
    from svdconvert.models.preflight import check_model
    from svdconvert.models.skeleton import check_stock

    source = open_source(path_or_text(model))
    row = factored_architecture(source.config, source.where)
    limit = parse_size(max_shard_size)
    steps = whole_steps(source, _dense_steps(source, row))
    check_model(source)
    config = model_files.dense_config(source.config, row)
    check_stock(config, source.where)
    made = row if source.whole is None else source.whole.tower
    work = Rewriting(
        command="densify",
        arguments="densify MODEL",
        source=source,
        row=row,
        steps=steps,
        config=config,
        title="densified",
        text=f"The low-rank factors of {source.name} multiplied out: a stock {made.dense_class} that computes the same "
        "function, for engines without remote code (GGUF conversion among them). Made by",
        details={"matrices": len(source.config["svd_ranks"])},
    )
    return rewrite(work, out, device=device, max_shard_bytes=limit, overwrite=overwrite, check=check, events=events)


def _dense_steps(source: Source, row: Architecture) -> list[Step]:
    """Every dense tensor: a product, parts of a fused projection put together, or a copy."""
    layout = layout_of(source.config)
    dense_biases = (f"{row.prefix}{module}.bias" for module in source.config["svd_ranks"])
    biases = {layout.bias_name(name): name for name in dense_biases}

    def multiplied(layers: Sequence[Layer]) -> list[Step]:
        return [_multiply_step(source, row, layout, layer) for layer in layers]

    def dense_name(name: str) -> str:
        return biases.get(name) or row.dense_name(name)

    return stacked(_joined(factored_steps(source, row, multiplied, dense_name), source, row), source, row)


def _joined(steps: Sequence[Step], source: Source, row: Architecture) -> list[Step]:
    """Steps that each make one dense tensor, those of the parts of a fused projection together as one.

    Raises:
        InputError: a part is missing.
    """
    split = split_layers(row, source.config["svd_ranks"])
    if not split:
        return list(steps)
    whole, parts = [], {step.outputs[0].name: step for step in steps}
    for name in list(parts):
        layer = name.removeprefix(row.prefix).rpartition(".")[0].rpartition(".")[0]
        fused, kind = f"{row.prefix}{layer}", name.rpartition(".")[2]
        if layer not in split or name not in parts:
            continue
        names = {part: f"{fused}.{part}.{kind}" for part in row.fused[suffix(layer)].names}
        missing = [own for own in names.values() if own not in parts]
        if missing:
            raise InputError(f"{source.where} lacks {listing(missing)}, which its config.json requires")
        whole.append(_join_step(f"{fused}.{kind}", {part: parts.pop(own) for part, own in names.items()}, source, row))
    return in_order([*parts.values(), *whole])


def _join_step(name: str, parts: Mapping[str, Step], source: Source, row: Architecture) -> Step:
    """The step of a fused weight or bias, from those of its parts.

    Raises:
        InputError: a part has another size than config.json says.
    """
    layer = name.removeprefix(row.prefix).rpartition(".")[0]
    sections = row.fused[suffix(layer)].sections(source.config)
    outputs = [step.outputs[0] for step in parts.values()]
    first, axis = outputs[0], len(outputs[0].shape) - 1 if row.transposed else 0
    for part, info in zip(parts, outputs, strict=True):
        if info.shape[axis] != sections[part].outputs:
            raise InputError(
                f"{info.name} of {source.where} has {info.shape[axis]} outputs, but according to config.json there are "
                f"{sections[part].outputs}; config and weights are not of one model"
            )
    rows = sum(section.outputs for section in sections.values())
    told = [
        {
            "kind": step.kind,
            "inputs": len(step.inputs),
            "options": dict(step.options),
            "section": [sections[part].start, sections[part].count, sections[part].stretches],
        }
        for part, step in parts.items()
    ]
    shape = (*first.shape[:axis], rows, *first.shape[axis + 1 :])
    inputs = tuple(info for step in parts.values() for info in step.inputs)
    options = {"transposed": row.transposed, "parts": told}
    return Step("join", name, inputs, (replace(first, name=name, shape=shape),), options)


def _multiply_step(source: Source, row: Architecture, layout: Layout, layer: Layer) -> Step:
    dtype = source.kept_type(layer.stored[0])
    product = TensorInfo(layer.weight, dtype, row.matrix_shape(layout.outer_shape(layer.stored)))
    options = {"layout": layout.name, "transposed": row.transposed}
    return Step("multiply", layer.weight, layer.stored, (product,), options)

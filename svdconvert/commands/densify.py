"""Back to the stock architecture: every product multiplied out, for engines without remote code."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from svdconvert.commands import card
from svdconvert.errors import InputError
from svdconvert.families.fused import split_layers
from svdconvert.families.table import Architecture, factored_architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Outcome, Reports, run_job
from svdconvert.layouts.table import layout_of, outer_shape, shared_layers, stored_names
from svdconvert.machine.devices import resolve_device
from svdconvert.models.positions import refuse_misplaced
from svdconvert.names import suffix
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, in_order, shard, with_copies
from svdconvert.settings.options import short_command
from svdconvert.storage.opening import open_source
from svdconvert.storage.source import Source
from svdconvert.storage.tying import head_copies
from svdconvert.tensors import TensorInfo, parameters
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
        model: folder of a factored model_files.
        out: folder to write.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        overwrite: replace what the folder holds.
        check: run a few tokens through the result afterwards and look at its logits.
        events: receiver of progress.

    Raises:
        InputError: the model or the folder cannot be used.
        JobError: it broke off; the same call continues it.
    """
    from svdconvert.commands.verify import self_check
    from svdconvert.models.preflight import check_model
    from svdconvert.models.skeleton import check_stock

    source = open_source(os.fspath(model))
    row = factored_architecture(source.config, source.where)
    limit = parse_size(max_shard_size)
    layout = layout_of(source.config)
    dense_biases = (f"{row.prefix}{module}.bias" for module in source.config["svd_ranks"])
    biases = {layout.bias_name(name): name for name in dense_biases}

    def dense_name(name: str) -> str:
        return biases.get(name) or row.dense_name(name)

    steps = factored_steps(source, row, lambda layers: [_multiply_step(row, layer) for layer in layers], dense_name)
    steps = _joined(steps, source, row)
    outputs = [info for step in steps for info in step.outputs]
    check_model(source)
    config = model_files.dense_config(source.config, row)
    check_stock(config, source.where)

    def model_card(reports: Reports) -> str:
        text = (
            f"The low-rank factors of {source.name} multiplied out: a stock {row.dense_class} that computes the same "
            "function, for engines without remote code (GGUF conversion among them). Made by"
        )
        command = short_command("densify MODEL", limit)
        return card.plain_card(source, f"{source.name}, densified", text, command, [])

    def details(reports: Reports) -> Mapping[str, Any]:
        return {"params": parameters(outputs), "matrices": len(source.config["svd_ranks"])}

    def prepare() -> Job:
        refuse_misplaced(source, row)
        return job

    job = Job(
        steps=steps,
        shards=shard(outputs, limit),
        config=config,
        extra={},
        card=model_card,
        details=details,
    )
    for note in source.notes:
        (events or Events()).note(note)
    return run_job(
        "densify",
        source,
        {"max_shard_bytes": limit},
        prepare,
        Path(out).expanduser(),
        device=resolve_device(device),
        overwrite=overwrite,
        check=self_check if check else None,
        events=events,
    )


@dataclass(frozen=True)
class Layer:
    """A factored layer of a model_files.

    Attributes:
        module: path in the base model.
        weight: name that its dense weight would have.
        stored: its tensors; the first one may be another layer's.
    """

    module: str
    weight: str
    stored: tuple[TensorInfo, ...]


def factored_steps(
    source: Source,
    row: Architecture,
    factored_step: Callable[[Sequence[Layer]], list[Step]],
    copied_name: Callable[[str], str],
) -> list[Step]:
    """Steps over a factored checkpoint: those for each layer or group of layers, a copy for everything else.

    Args:
        source: the factored model_files.
        row: its architecture.
        factored_step: a layer, and those that share its input-side factor -> the steps that make something of them.
        copied_name: name in the source -> name in the result, for the tensors that are copied.

    Raises:
        InputError: config.json names a factor that the files do not have, or an owner that there is not.
    """
    ranks, shared = source.config["svd_ranks"], shared_layers(source.config)
    groups: dict[str, list[Layer]] = {module: [] for module in ranks if module not in shared}
    factors: set[str] = set()
    for module, rank in sorted(ranks.items(), key=lambda item: item[0] in shared):
        names = stored_names(source.config, row.prefix, module)
        missing = [name for name in names if name not in source.tensors]
        if missing:
            raise InputError(f"{source.where} lacks {listing(missing)}, which its config.json requires")
        stored = tuple(source.tensors[name] for name in names)
        if stored[0].shape[0] != rank or stored[1].shape[1] != rank:
            raise InputError(f"{module} of {source.where} has rank {stored[0].shape[0]}, but config.json says {rank}")
        owner = shared.get(module, module)
        if owner not in groups:
            raise InputError(f"config.json of {source.where} lets {module} share with {owner}, which has no factor")
        groups[owner].append(Layer(module, f"{row.prefix}{module}.weight", stored))
        factors.update(names)
    steps = [step for layers in groups.values() for step in factored_step(layers)]
    copies = head_copies(row, source)
    full = row.full_names(source.tensors, source.config)
    for name, info in source.tensors.items():
        if name not in factors and info not in copies:
            steps.append(with_copies(copy_step(info, copied_name(full[name])), copies, row))
    return in_order(steps)


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


def copy_step(info: TensorInfo, name: str) -> Step:
    """Take a tensor over unchanged."""
    return Step("copy", info.name, (info,), (replace(info, name=name, file="", start=-1),))


def _multiply_step(row: Architecture, layer: Layer) -> Step:
    product = TensorInfo(layer.weight, layer.stored[0].dtype, row.matrix_shape(outer_shape(layer.stored)))
    return Step("multiply", layer.weight, layer.stored, (product,), {"transposed": row.transposed})

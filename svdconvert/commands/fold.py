"""Exact merge of a LoRA adapter into a factored model_files.

An adapter beside a factored layer, h = B(A x) + s LB(LA x), is itself a product of rank q; so the sum is a product of
rank r + q, [B, s LB] [A; LA], and nothing is lost. On a layer that stayed dense the usual W + s LB LA applies. Layers
that share A go on sharing it: it gets the rows LA of all their adapters, and each B zeros for those of the others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdconvert.commands import card
from svdconvert.commands.adapter import ADAPTER_WEIGHTS, Adapter
from svdconvert.commands.densify import Layer, copy_step, factored_steps
from svdconvert.errors import InputError
from svdconvert.families.table import factored_architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Outcome, Reports, run_job
from svdconvert.layouts.table import layout_of, outer_shape
from svdconvert.machine.devices import resolve_device
from svdconvert.models.positions import refuse_misplaced
from svdconvert.names import suffix
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, shard
from svdconvert.sentences import asked
from svdconvert.settings.options import short_command
from svdconvert.storage.source import LocalSource, Source
from svdconvert.tensors import TensorInfo, parameters
from svdconvert.words import listing, parse_size


class _WithAdapter(LocalSource):
    """A factored checkpoint and an adapter for it, read as one."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        super().__init__(folder)
        self.adapter = adapter

    def path(self, file: str) -> Path:
        return self.adapter.folder / ADAPTER_WEIGHTS if file == ADAPTER_WEIGHTS else super().path(file)

    def identity(self) -> dict[str, Any]:
        return LocalSource.identity(self) | {"adapter": self.adapter.identity()}


def fold(
    model: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    device: str = "auto",
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    check: bool = True,
    events: Events | None = None,
) -> Outcome:
    """Merge a LoRA adapter into a factored checkpoint; the ranks grow by the adapter's.

    Args:
        model: folder of a factored model_files.
        adapter: folder that peft's ``save_pretrained`` wrote.
        out: folder to write.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        overwrite: replace what the folder holds.
        check: run a few tokens through the result afterwards and look at its logits.
        events: receiver of progress.

    Raises:
        InputError: one of both cannot be used, or they do not fit each other.
        JobError: it broke off; the same call continues it.
    """
    from svdconvert.commands.verify import self_check
    from svdconvert.models.preflight import check_model

    folder, adapter_folder = Path(model).expanduser(), Path(adapter).expanduser()
    for path in (folder, adapter_folder):
        if not path.is_dir():
            raise InputError(f"there is no folder {path}")
    if Path(out).expanduser().resolve() == adapter_folder.resolve():
        raise InputError(f"{asked('out', out)} is the adapter's own folder; give another one")
    lora = Adapter(adapter_folder)
    source = _WithAdapter(folder, lora)
    row = factored_architecture(source.config, source.where)
    limit = parse_size(max_shard_size)
    steps, ranks = _steps(source, lora)
    outputs = [info for step in steps for info in step.outputs]
    check_model(source)
    for first, second in lora.pairs.values():
        # The reader asks the source where a tensor lies.
        source.tensors[first.name], source.tensors[second.name] = first, second

    def model_card(reports: Reports) -> str:
        text = f"{source.name} with a LoRA adapter folded into its factors, whose ranks grew by the adapter's. Made by"
        command = short_command("fold MODEL --adapter ADAPTER", limit)
        return card.plain_card(source, f"{source.name}, adapter folded in", text, command, ["low-rank", "svd"])

    def details(reports: Reports) -> Mapping[str, Any]:
        return {"params": parameters(outputs), "folded": sorted(lora.pairs)}

    def prepare() -> Job:
        refuse_misplaced(source, row)
        _refuse_overflow(source, lora, steps)
        return job

    job = Job(
        steps=steps,
        shards=shard(outputs, limit),
        config=dict(source.config) | {"svd_ranks": ranks},
        extra={f"{row.modeling}.py": model_files.modeling_source(row)},
        card=model_card,
        details=details,
    )
    for note in source.notes:
        (events or Events()).note(note)
    return run_job(
        "fold",
        source,
        {"max_shard_bytes": limit},
        prepare,
        Path(out).expanduser(),
        device=resolve_device(device),
        overwrite=overwrite,
        check=self_check if check else None,
        events=events,
    )


def _refuse_overflow(source: Source, lora: Adapter, steps: Sequence[Step]) -> None:
    """Refuse factors that are not finite, or not in the type of the layers they come to, before any is folded."""
    import torch

    from svdconvert.linalg.precision import refuse_overflow
    from svdconvert.storage.reader import WeightReader, torch_dtype

    stored = {info.name: torch_dtype(step.outputs[0].dtype) for step in steps for info in step.inputs}
    with WeightReader(source) as reader:
        for module, pair in lora.pairs.items():
            for info in pair:
                factor = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).float()
                scaled = factor * abs(lora.scales[module]) ** 0.5
                what = f"{lora.folder} cannot be folded: {info.name}, scaled,"
                refuse_overflow(scaled.to(stored[info.name]), what, "it is damaged, or its lora_alpha too large")


def _steps(source: Source, lora: Adapter) -> tuple[list[Step], dict[str, int]]:
    """The job, and the new ranks.

    Raises:
        InputError: the adapter names a layer that the model does not have, or one of another shape.
    """
    row = factored_architecture(source.config, source.where)
    if lora.config.get("fan_in_fan_out") and not row.transposed:
        raise InputError(
            f"{lora.folder} cannot be folded: its fan_in_fan_out is True, but {source.where} has no Conv1D"
        )
    ranks = dict(source.config["svd_ranks"])
    left = dict(lora.pairs)
    layout = layout_of(source.config)

    def check(module: str, shape: tuple[int, int], pair: tuple[TensorInfo, TensorInfo]) -> None:
        if (pair[1].shape[0], pair[0].shape[1]) != shape:
            raise InputError(f"the adapter's weights for {module} do not fit a {shape[0]} x {shape[1]} layer")

    def extend(layers: Sequence[Layer]) -> list[Step]:
        pairs = {i: left.pop(f"{row.prefix}{layer.module}", None) for i, layer in enumerate(layers)}
        adapted = {i: pair for i, pair in pairs.items() if pair is not None}
        # the first tensor is that of all of them
        stored = (*layers[0].stored, *(info for layer in layers[1:] for info in layer.stored[1:]))
        if not adapted:
            return [copy_step(info, info.name) for info in stored]
        shapes = [outer_shape(layer.stored) for layer in layers]
        for i, pair in adapted.items():
            check(layers[i].module, shapes[i], pair)
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        rank = stored[0].shape[0] + sum(pair[0].shape[0] for pair in adapted.values())
        if rank > min(shape) or (layout.index and rank == shape[0]):
            raise InputError(
                f"folding would raise {layers[0].module} to rank {rank}, more than a {shape[0]} x {shape[1]} matrix "
                f"{'including the layers that share its factor ' if len(layers) > 1 else ''}has; "
                "run `svdconvert densify` and merge the adapter into the dense model"
            )
        ranks.update({layer.module: rank for layer in layers})
        weight, scales = layers[0].weight, {i: lora.scales[f"{row.prefix}{layers[i].module}"] for i in adapted}
        inputs = (*stored, *(info for pair in adapted.values() for info in pair))
        if len(layers) == 1:
            outputs = layout.tensors(weight, rank, shape, stored[0].dtype)
            return [Step("extend", weight, inputs, outputs, {"scale": scales[0]})]
        wider = [replace(info, shape=(info.shape[0], rank), file="", start=-1) for info in stored[1:]]
        down = replace(stored[0], shape=(rank, shape[1]), file="", start=-1)
        options = {"layers": len(layers), "scales": list(scales.items())}
        return [Step("extend_shared", weight, inputs, (down, *wider), options)]

    steps = []
    for step in factored_steps(source, row, extend, lambda name: name):
        module = step.key.removesuffix(".weight")
        pair = left.pop(module, None) if step.kind == "copy" and step.key.endswith(".weight") else None
        if pair is None:
            steps.append(step)
            continue
        info = step.inputs[0]
        # Only the linear layers of blocks are stored the other way round.
        transposed = row.transposed and suffix(module.removeprefix(row.prefix)) in (*row.targets, *row.split().targets)
        check(module, (info.shape[1], info.shape[0]) if transposed else (info.shape[0], info.shape[1]), pair)
        options = {"scale": lora.scales[module], "transposed": transposed}
        steps.append(Step("add", step.key, (info, *pair), step.outputs, options))
    if left:
        raise InputError(
            f"the adapter changes {listing(sorted(left))}, which {source.where} does not have as layers of its own; "
            "it was trained on another model"
        )
    return steps, ranks

"""Exact merge of a LoRA adapter into a factored checkpoint.

An adapter beside a factored layer, h = B(A x) + s LB(LA x), is itself a product of rank q; so the sum is a product of
rank r + q, [B, s LB] [A; LA], and nothing is lost. On a layer that stayed dense the usual W + s LB LA applies. Layers
that share A go on sharing it: it gets the rows LA of all their adapters, and each B zeros for those of the others.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdconvert.commands.adapter import ADAPTER_WEIGHTS, Adapter
from svdconvert.commands.rewriting import Layer, Rewriting, copy_step, factored_steps, rewrite
from svdconvert.errors import InputError
from svdconvert.families.table import Architecture, factored_architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Outcome
from svdconvert.layouts.table import layout_of
from svdconvert.names import suffix
from svdconvert.paths import user_path
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step
from svdconvert.planning.whole import whole_steps
from svdconvert.sentences import asked
from svdconvert.storage.packed_config import unpacked_config
from svdconvert.storage.source import LocalSource, Source
from svdconvert.storage.whole import Whole
from svdconvert.tensors import TensorInfo
from svdconvert.words import listing, parse_size

# Dimensions of a linear layer's weight.
MATRIX = 2


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
        model: folder of a factored checkpoint.
        adapter: folder that peft's ``save_pretrained`` wrote.
        out: folder to write.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_shard_size: limit of a weight file, in bytes or as ``5GB``.
        overwrite: replace what the folder holds.
        check: run a few tokens through the result afterwards and check its logits.
        events: receiver of progress.

    Raises:
        InputError: one of both cannot be used, or they do not fit each other.
        JobError: it broke off; the same call continues it.
    """
    from svdconvert.models.preflight import check_model

    folder, adapter_folder = user_path(model), user_path(adapter)
    for path in (folder, adapter_folder):
        if not path.is_dir():
            raise InputError(f"there is no folder {path}")
    if user_path(out).resolve() == adapter_folder.resolve():
        raise InputError(f"{asked('out', out)} is the adapter's own folder; give another one")
    lora = Adapter(adapter_folder)
    source = _WithAdapter(folder, lora)
    row = factored_architecture(source.config, source.where)
    limit = parse_size(max_shard_size)
    folding = _Folding(source, row, lora)
    steps = folding.steps()
    check_model(source)
    for first, second in lora.pairs.values():
        # The reader asks the source where a tensor lies.
        source.tensors[first.name], source.tensors[second.name] = first, second
    if source.packed:
        (events or Events()).note(
            f"{source.where} has packed weights, and their sums with an adapter are on no grid; all are written "
            "multiplied out, in the type of their scales, so the result is larger"
        )
    work = Rewriting(
        command="fold",
        arguments="fold MODEL --adapter ADAPTER",
        source=source,
        row=row,
        steps=steps,
        config=unpacked_config(source.config) | {"svd_ranks": folding.ranks},
        extra=model_files.code_files(source, row),
        title="adapter folded in",
        text=f"{source.name} with a LoRA adapter folded into its factors, whose ranks grew by the adapter's"
        f"{'; the weights that were packed are multiplied out' if source.packed else ''}. Made by",
        details={"folded": sorted(lora.pairs)},
        tags=("low-rank", "svd"),
    )
    return rewrite(
        work,
        out,
        device=device,
        max_shard_bytes=limit,
        overwrite=overwrite,
        check=check,
        events=events,
        before=lambda: _refuse_overflow(source, lora, steps),
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


class _Folding:
    """The steps that fold an adapter in.

    Attributes:
        ranks: module path -> rank; those of the result once :meth:`steps` has been called.
    """

    def __init__(self, source: Source, row: Architecture, lora: Adapter) -> None:
        if lora.config.get("fan_in_fan_out") and not row.transposed:
            raise InputError(
                f"{lora.folder} cannot be folded: its fan_in_fan_out is True, but {source.where} has no Conv1D"
            )
        self._source, self._row, self._lora = source, row, lora
        self._layout = layout_of(source.config)
        self._paths = {_own_path(source.whole, path): path for path in lora.pairs}
        self._left = {own: lora.pairs[path] for own, path in self._paths.items()}
        self.ranks: dict[str, int] = dict(source.config["svd_ranks"])

    def steps(self) -> list[Step]:
        """All steps of the job.

        Raises:
            InputError: the adapter names a layer that the model does not have, or one of another shape.
        """
        steps = factored_steps(self._source, self._row, self._extended, lambda name: name)
        steps = [self._merged(step) for step in whole_steps(self._source, steps)]
        if self._left:
            left = sorted(self._paths[own] for own in self._left)
            raise InputError(
                f"the adapter changes {listing(left)}, which {self._source.where} does not have as "
                "layers of its own; it was trained on another model"
            )
        return steps

    def _extended(self, layers: Sequence[Layer]) -> list[Step]:
        """Layers that share an input-side factor, or a single one, with the ranks of their adapters."""
        row, lora = self._row, self._lora
        pairs = {i: self._left.pop(f"{row.prefix}{layer.module}", None) for i, layer in enumerate(layers)}
        adapted = {i: pair for i, pair in pairs.items() if pair is not None}
        # the first tensor is that of all of them
        stored = (*layers[0].stored, *(info for layer in layers[1:] for info in layer.stored[1:]))
        if not adapted:
            return [copy_step(self._source, info, info.name) for info in stored]
        shapes = [self._layout.outer_shape(layer.stored) for layer in layers]
        for i, pair in adapted.items():
            _check_shape(layers[i].module, shapes[i], pair)
        shape = (sum(rows for rows, _ in shapes), shapes[0][1])
        rank = stored[0].shape[0] + sum(pair[0].shape[0] for pair in adapted.values())
        if rank > self._layout.rank_limit(shape):
            raise InputError(
                f"folding would raise {layers[0].module} to rank {rank}, more than a {shape[0]} x {shape[1]} matrix "
                f"{'including the layers that share its factor ' if len(layers) > 1 else ''}has; "
                "run `svdconvert densify` and merge the adapter into the dense model"
            )
        self.ranks.update({layer.module: rank for layer in layers})
        dtype = self._source.kept_type(stored[0])
        weight = layers[0].weight
        scales = {i: lora.scales[self._paths[f"{row.prefix}{layers[i].module}"]] for i in adapted}
        inputs = (*stored, *(info for pair in adapted.values() for info in pair))
        if len(layers) == 1:
            outputs = self._layout.tensors(weight, rank, shape, dtype)
            return [Step("extend", weight, inputs, outputs, {"layout": self._layout.name, "scale": scales[0]})]
        plain = [replace(info, dtype=self._source.kept_type(info), file="", start=-1) for info in stored]
        wider = [replace(info, shape=(info.shape[0], rank)) for info in plain[1:]]
        down = replace(plain[0], shape=(rank, shape[1]))
        options = {"layers": len(layers), "scales": list(scales.items())}
        return [Step("extend_shared", weight, inputs, (down, *wider), options)]

    def _merged(self, step: Step) -> Step:
        """A step that copies the weight of a dense layer, with the adapter's product added to it."""
        module = step.key.removesuffix(".weight")
        pair = self._left.pop(module, None) if step.kind == "copy" and step.key.endswith(".weight") else None
        if pair is None:
            return step
        info, row = step.inputs[0], self._row
        if len(info.shape) != MATRIX:
            raise InputError(
                f"{self._lora.folder} cannot be folded: {module} of {self._source.where} has a weight of shape "
                f"{list(info.shape)}, which is no linear layer's; it was trained on another model"
            )
        # Only the linear layers of blocks are stored the other way round.
        transposed = row.transposed and suffix(module.removeprefix(row.prefix)) in (*row.targets, *row.split().targets)
        rows, columns = info.shape[0], info.shape[1]
        _check_shape(module, (columns, rows) if transposed else (rows, columns), pair)
        options = {"scale": self._lora.scales[self._paths[module]], "transposed": transposed}
        return Step("add", step.key, (info, *pair), step.outputs, options)


def _own_path(whole: Whole | None, path: str) -> str:
    """What steps call a module that an adapter names: that of the language model by its own name, any other one of a
    model that sees by its name in files."""
    return path if whole is None else whole.of_memory(f"{path}.weight").removesuffix(".weight")


def _check_shape(module: str, shape: tuple[int, int], pair: tuple[TensorInfo, TensorInfo]) -> None:
    """Refuse an adapter's A and B that are not of a layer's shape, ``(out, in)``."""
    if (pair[1].shape[0], pair[0].shape[1]) != shape:
        raise InputError(f"the adapter's weights for {module} do not fit a {shape[0]} x {shape[1]} layer")

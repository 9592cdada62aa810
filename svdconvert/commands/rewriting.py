"""A factored checkpoint made into another one, tensor by tensor: what `densify`, `fold` and `heal` have in common."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from svdconvert.commands import card
from svdconvert.errors import InputError
from svdconvert.families.table import Architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Outcome, Reports, run_job
from svdconvert.layouts.table import layout_of, shared_layers, stored_names
from svdconvert.machine.devices import resolve_device
from svdconvert.models.index_tensors import refuse_unsound
from svdconvert.paths import user_path
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step, in_order, shard, with_copies
from svdconvert.settings.options import short_command
from svdconvert.storage.source import Source
from svdconvert.storage.tying import head_copies
from svdconvert.tensors import TensorInfo, parameters
from svdconvert.words import listing


@dataclass(frozen=True)
class Layer:
    """A factored layer of a checkpoint.

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
        source: the factored checkpoint.
        row: its architecture.
        factored_step: a layer, and those that share its input-side factor -> the steps that make something of them.
        copied_name: name in the source -> name in the result, for the tensors that are copied.

    Raises:
        InputError: config.json names a factor that the files do not have, or an owner that there is not.
    """
    groups = _groups(source, row)
    factors = {info.name for layers in groups for layer in layers for info in layer.stored}
    steps = [step for layers in groups for step in factored_step(layers)]
    copies = head_copies(row, source)
    full = row.full_names(source.tensors, source.config)
    for name, info in source.tensors.items():
        if name not in factors and info not in copies:
            steps.append(with_copies(copy_step(source, info, copied_name(full[name])), copies, row))
    return in_order(steps)


def _groups(source: Source, row: Architecture) -> list[list[Layer]]:
    """The factored layers, those that share a factor together, its owner first."""
    ranks, shared, layout = source.config["svd_ranks"], shared_layers(source.config), layout_of(source.config)
    groups: dict[str, list[Layer]] = {module: [] for module in ranks if module not in shared}
    for module, rank in sorted(ranks.items(), key=lambda item: item[0] in shared):
        names = stored_names(source.config, row.prefix, module)
        missing = [name for name in names if name not in source.tensors]
        if missing:
            raise InputError(f"{source.where} lacks {listing(missing)}, which its config.json requires")
        stored = tuple(source.tensors[name] for name in names)
        for place, axis in layout.rank_axes:
            if stored[place].shape[axis] != rank:
                found = stored[place].shape[axis]
                raise InputError(f"{module} of {source.where} has rank {found}, but config.json says {rank}")
        owner = shared.get(module, module)
        if owner not in groups:
            raise InputError(f"config.json of {source.where} lets {module} share with {owner}, which has no factor")
        groups[owner].append(Layer(module, f"{row.prefix}{module}.weight", stored))
    return list(groups.values())


def copy_step(source: Source, info: TensorInfo, name: str) -> Step:
    """Take a tensor over unchanged; a packed one multiplied out, in the type of its scales."""
    return Step(
        "copy", info.name, (info,), (replace(info, name=name, dtype=source.kept_type(info), file="", start=-1),)
    )


@dataclass(frozen=True)
class Rewriting:
    """What is to become of a factored checkpoint.

    Attributes:
        command: name of the tool's command.
        arguments: that command as its card shows it, without the options.
        source: the factored checkpoint.
        row: its architecture.
        steps: all of the job.
        config: of the result.
        extra: further files of the result.
        title: of the card, behind the source's name.
        text: of the card, ending in ``Made by``.
        tags: of the card.
        details: what svdconvert.json says besides.
    """

    command: str
    arguments: str
    source: Source
    row: Architecture
    steps: Sequence[Step]
    config: Mapping[str, Any]
    title: str
    text: str
    details: Mapping[str, Any]
    extra: Mapping[str, bytes] = field(default_factory=dict)
    tags: Sequence[str] = ()


def rewrite(
    work: Rewriting,
    out: str | os.PathLike[str],
    *,
    device: str,
    max_shard_bytes: int,
    overwrite: bool,
    check: bool,
    events: Events | None,
    before: Callable[[], None] = lambda: None,
) -> Outcome:
    """Write the result.

    Args:
        work: what it is.
        out: folder to write.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        max_shard_bytes: limit of a weight file.
        overwrite: replace what the folder holds.
        check: run a few tokens through the result afterwards and check its logits.
        events: receiver of progress.
        before: looks at what is read, once the folder is ours and before anything is written.

    Raises:
        InputError: the folder or a tensor cannot be used.
        JobError: it broke off; the same call continues it.
    """
    from svdconvert.commands.verify import self_check

    source = work.source
    outputs = [info for step in work.steps for info in step.outputs]

    command = short_command(work.arguments, max_shard_bytes)

    def model_card(reports: Reports) -> str:
        return card.plain_card(source, f"{source.name}, {work.title}", work.text, command, work.tags)

    def prepare() -> Job:
        refuse_unsound(source, work.row)
        before()
        return job

    job = Job(
        steps=work.steps,
        shards=shard(outputs, max_shard_bytes),
        config=model_files.written_config(source, work.config),
        extra=work.extra,
        card=model_card,
        details=lambda reports: {"params": parameters(outputs), **work.details, "repeat": command},
    )
    for note in source.notes:
        (events or Events()).note(note)
    return run_job(
        work.command,
        source,
        {"max_shard_bytes": max_shard_bytes},
        prepare,
        user_path(out),
        device=resolve_device(device),
        overwrite=overwrite,
        check=self_check if check else None,
        events=events,
    )

"""What a healed model leaves beside its weights, and the steps that write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdconvert.commands.rewriting import Layer, factored_steps
from svdconvert.families.table import Architecture
from svdconvert.grids import PACKED, SUFFIXES
from svdconvert.healing.outcome import Healed
from svdconvert.healing.trained import trained_names
from svdconvert.healing.work import HealingWork
from svdconvert.planning.steps import Step, in_order
from svdconvert.storage.source import LocalSource
from svdconvert.tensors import TensorInfo


def healing_details(work: HealingWork, healed: Healed) -> Mapping[str, Any]:
    """What svdconvert.json tells of healing: ``matrices`` as they are now, ``rounded`` ones, and ``healing``."""
    dense = work.dense
    against = {"name": dense.name, "repo": dense.repo, "commit": dense.commit}
    return {
        "matrices": {module: report.to_json() for module, report in healed.matrices.items()},
        **({"rounded": {name: one.to_json() for name, one in healed.rounded.items()}} if work.source.packed else {}),
        "healing": {**healed.to_json(), "against": against, "text_digest": work.tokens.text_digest},
    }


def healed_steps(source: LocalSource, row: Architecture, file: Path) -> list[Step]:
    """All steps of the job: what was trained comes from a file, everything else is copied.

    They read :func:`as_stored`.

    Raises:
        InputError: config.json names a factor that the files do not have.
    """
    trained, files = trained_names(source), as_stored(source)

    def stored(info: TensorInfo) -> list[TensorInfo]:
        """A tensor in the files: of a packed weight, all that stand for it."""
        if info.name not in source.packed:
            return [info]
        stem = source.packed[info.name].words.name.removesuffix(PACKED)
        return [files.tensors[stem + suffix] for suffix in SUFFIXES]

    def healed(layers: Sequence[Layer]) -> list[Step]:
        # the first tensor is that of all layers that share it
        tensors = (*layers[0].stored, *(info for layer in layers[1:] for info in layer.stored[1:]))
        return [step_of(layers[0].weight, tensors, source.config["svd_ranks"][layers[0].module])]

    def step_of(key: str, tensors: Sequence[TensorInfo], rank: int | None) -> Step:
        inputs = tuple(part for info in tensors for part in stored(info))
        outputs = tuple(replace(info, file="", start=-1) for info in inputs)
        options = {"file": str(file), "factors": [info.name for info in inputs if info.name in trained]}
        return Step("healed", key, inputs, outputs, options | ({} if rank is None else {"rank": rank}))

    steps = factored_steps(source, row, healed, lambda name: name)
    return in_order(
        step_of(step.key, step.inputs, None) if step.kind == "copy" and step.key in source.packed else step
        for step in steps
    )


def as_stored(source: LocalSource) -> LocalSource:
    """The checkpoint that a healing writes anew: with packed weights as the tensors that stand for them."""
    return LocalSource(source.folder, as_stored=True) if source.packed else source

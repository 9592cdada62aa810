"""What a healed model leaves beside its weights, and the steps that write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svdconvert.commands.rewriting import Layer, factored_steps
from svdconvert.families.table import Architecture
from svdconvert.healing.outcome import Healed
from svdconvert.healing.student import factor_names
from svdconvert.healing.work import HealingWork
from svdconvert.planning.steps import Step
from svdconvert.storage.source import LocalSource


def healing_details(work: HealingWork, healed: Healed) -> Mapping[str, Any]:
    """What svdconvert.json tells of healing: ``matrices`` as they are now, and ``healing``."""
    dense = work.dense
    against = {"name": dense.name, "repo": dense.repo, "commit": dense.commit}
    return {
        "matrices": {module: report.to_json() for module, report in healed.matrices.items()},
        "healing": {**healed.to_json(), "against": against, "text_digest": work.tokens.text_digest},
    }


def healed_steps(source: LocalSource, row: Architecture, file: Path) -> list[Step]:
    """All steps of the job: factors come from a file, everything else is copied.

    Raises:
        InputError: config.json names a factor that the files do not have.
    """

    def trained(layers: Sequence[Layer]) -> list[Step]:
        # the first tensor is that of all layers that share it
        stored = (*layers[0].stored, *(info for layer in layers[1:] for info in layer.stored[1:]))
        outputs = tuple(replace(info, file="", start=-1) for info in stored)
        options = {"file": str(file), "factors": [info.name for info in stored if info.name in factors]}
        return [Step("healed", layers[0].weight, stored, outputs, options)]

    factors = set(factor_names(source))
    return factored_steps(source, row, trained, lambda name: name)

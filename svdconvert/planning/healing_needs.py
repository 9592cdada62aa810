"""What healing takes of memory and of the disk, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from svdconvert.families.row import Architecture
from svdconvert.families.table import longest_input
from svdconvert.layouts.table import layout_named
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step, files_bytes
from svdconvert.planning.text_memory import TEXT_BASE_BYTES
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.healing import HealRequest
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo, parameters

# Bytes of each parameter in float32; and of each one of a factor its gradient or a copy, and two moments.
WEIGHT, TRAINED = 4, 12
# Copies of the factors in the type that they are stored in: the start, the best so far, and those that are judged.
COPIES = 3
# Bytes of a number of a hidden state.
STATE = 4


def training_bytes(tensors: Iterable[TensorInfo], factors: Sequence[TensorInfo]) -> int:
    """Memory of a model whose factors are trained, without activations.

    Args:
        tensors: all of the model.
        factors: those that are trained.
    """
    stored = sum(info.nbytes for info in factors)
    return WEIGHT * parameters(tensors) + TRAINED * parameters(factors) + COPIES * stored


@dataclass(frozen=True)
class HealingNeeds:
    """What healing at the end of a conversion takes.

    Attributes:
        memory_bytes: of the process, without activations.
        disk_bytes: on top of the result: the model as it was converted, hidden states of the dense one, and the state
            of the training.
    """

    memory_bytes: int
    disk_bytes: int


def healing_needs(
    source: Source,
    row: Architecture,
    targets: Iterable[Target],
    steps: Iterable[Step],
    shards: Mapping[str, Sequence[TensorInfo]],
    request: Conversion,
) -> HealingNeeds | None:
    """Those of a conversion; None where it heals nothing.

    Args:
        source: the dense model.
        row: its architecture.
        targets: the matrices, with a rank or a reason to stay dense.
        steps: of the conversion.
        shards: its weight files.
        request: what is asked for.
    """
    healing = request.healing
    if healing is None:
        return None
    ranked = {target.weight for target in targets if target.rank is not None}
    kinds = tuple(f".{suffix}" for suffix in layout_named(request.recipe.layout).weights(1, (2, 2)))
    factors = [info for step in steps if step.key in ranked for info in step.outputs if info.name.endswith(kinds)]
    outputs = [info for infos in shards.values() for info in infos]
    states, stored = _states_bytes(source, row, healing), sum(info.nbytes for info in factors)
    # while it is replaced, the training's state lies there twice
    training = states + 2 * (TRAINED * parameters(factors) + stored)
    return HealingNeeds(
        TEXT_BASE_BYTES + training_bytes(outputs, factors), files_bytes(shards) + max(2 * states, training, stored)
    )


def _states_bytes(source: Source, row: Architecture, healing: HealRequest) -> int:
    """Hidden states of a text; one that is shorter than it was asked for has fewer."""
    text, named = healing.calibration, row.full_names(source.tensors, source.config)
    width = next(info.shape[1] for name, info in source.tensors.items() if named[name] == row.embedding)
    return STATE * width * text.samples * (text.length or min(2048, longest_input(source.config, 2048)))

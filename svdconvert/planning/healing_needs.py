"""What healing takes of memory and of the disk, counted from shapes alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from svdconvert.families.row import Architecture
from svdconvert.families.table import longest_input
from svdconvert.grids import SCALE
from svdconvert.layouts.table import layout_named
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step, files_bytes
from svdconvert.planning.text_memory import TEXT_BASE_BYTES
from svdconvert.settings.conversion import Conversion
from svdconvert.settings.healing import HealRequest
from svdconvert.storage.source import Source
from svdconvert.tensors import FLOATS, TensorInfo, parameters

# Bytes of each parameter in float32, and of each integer. Of each number that is trained, its gradient or a copy, and
# what is kept of the gradients before: of a factor a mean, of a scale two moments. Of each scale besides, what it was
# in float32, and what moves it.
WEIGHT, INTEGER, FACTOR, MOMENTS, MOVED = 4, 1, 8, 12, 8
# Copies of what is trained in the type that it is stored in: the start, the best so far, and those that are judged.
COPIES = 3
# Bytes of a number of a hidden state.
STATE = 4


def training_bytes(
    tensors: Iterable[TensorInfo], trained: Sequence[TensorInfo], packed: Collection[str] = frozenset()
) -> int:
    """Memory of a model of which a part is trained, without activations.

    Args:
        tensors: all of the model, packed weights as the matrices that they stand for.
        trained: those that are trained; of packed weights the scales.
        packed: names of packed weights.
    """
    every = list(tensors)
    loaded, integers = parameters(every), sum(info.size for info in every if info.name in packed)
    weights = WEIGHT * (loaded - integers) + INTEGER * integers + MOVED * parameters(filter(_is_scale, trained))
    stored = sum(info.nbytes for info in trained)
    # it is loaded in float32 before its integers take the place of packed weights
    return max(WEIGHT * loaded, weights + _kept_bytes(trained) + COPIES * stored)


def _kept_bytes(trained: Sequence[TensorInfo]) -> int:
    """Of what is trained, gradients and what is kept of them; or copies and that, as the state in a file."""
    scales = parameters(filter(_is_scale, trained))
    return MOMENTS * scales + FACTOR * (parameters(trained) - scales)


def _is_scale(info: TensorInfo) -> bool:
    return info.name.endswith(f".{SCALE}")


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
    targets = list(targets)
    ranked = {target.weight for target in targets if target.rank is not None}
    kinds = tuple(f".{suffix}" for suffix in layout_named(request.recipe.layout).weights(1, (2, 2)))
    rounded = {target.weight: target for target in targets if target.rounded}
    outputs, trained, packed = list[TensorInfo](), list[TensorInfo](), set[str]()
    for step in steps:
        if step.key in rounded:
            trained += [info for info in step.outputs if info.dtype in FLOATS]  # no integers, and no positions
            weights = _as_read(rounded[step.key], row, step)
            outputs += weights
            packed |= {info.name for info in weights} - {info.name for info in step.outputs}
            continue
        outputs += step.outputs
        if step.key in ranked:
            trained += [info for info in step.outputs if info.name.endswith(kinds)]
    states, stored = _states_bytes(source, row, healing), sum(info.nbytes for info in trained)
    # while it is replaced, the training's state lies there twice
    training = states + 2 * (_kept_bytes(trained) + stored)
    return HealingNeeds(
        TEXT_BASE_BYTES + training_bytes(outputs, trained, packed),
        files_bytes(shards) + max(2 * states, training, stored),
    )


def _as_read(target: Target, row: Architecture, step: Step) -> Sequence[TensorInfo]:
    """The weights that the tensors of a rounding step stand for."""
    code = next(info.dtype for info in step.outputs if info.dtype in FLOATS)
    return replace(target, grids=()).tensors(f"{row.prefix}{target.module}.weight", code)


def _states_bytes(source: Source, row: Architecture, healing: HealRequest) -> int:
    """Hidden states of a text; one that is shorter than it was asked for has fewer."""
    text, shapes = healing.calibration, row.parameters(source.config)
    # the first matrix of a block that a model has; an embedding may be of another width
    ends = [f".{target}.weight" for target in row.targets]
    shape = next(shape for end in ends for name, shape in shapes.items() if name.endswith(end))
    width = shape[0] if row.transposed else shape[1]
    return STATE * width * text.samples * (text.length or min(2048, longest_input(source.config, 2048)))

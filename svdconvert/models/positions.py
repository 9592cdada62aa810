"""The output positions of pivoted layers: permutations, whatever has been done to the files since they were written."""

from __future__ import annotations

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture
from svdconvert.layouts.table import stored_names
from svdconvert.storage.source import Source


def misplaced(source: Source, row: Architecture) -> str | None:
    """The first tensor of positions that is no permutation of a layer's outputs, as a mean of two conversions is none.

    Args:
        source: a factored checkpoint whose tensors are all there.
        row: its architecture.
    """
    import torch

    from svdconvert.storage.reader import WeightReader

    reader = WeightReader(source)
    try:
        for module in source.config["svd_ranks"]:
            for name in stored_names(source.config, row.prefix, module)[2:]:
                info = source.tensors[name]
                found = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).flatten()
                if found.is_floating_point() or not torch.equal(found.long().sort().values, torch.arange(len(found))):
                    return name
    finally:
        reader.close()
    return None


def refuse_misplaced(source: Source, row: Architecture) -> None:
    """InputError that names the first tensor of positions that is no permutation."""
    name = misplaced(source, row)
    if name is not None:
        raise InputError(
            f"{name} of {source.where} is not a permutation of its layer's outputs: something has changed it (by "
            "averaging two conversions, say); convert the model again"
        )

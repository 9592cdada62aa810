"""Index tensors of factored layers, whatever has been done to the files since they were written."""

from __future__ import annotations

from svdconvert.errors import InputError
from svdconvert.families.table import Architecture
from svdconvert.layouts.table import layout_of, stored_names
from svdconvert.storage.source import Source


def unsound(source: Source, row: Architecture) -> str | None:
    """The first index tensor whose values its layout cannot have written, as a mean of two conversions has them.

    Args:
        source: a factored checkpoint whose tensors are all there.
        row: its architecture.
    """
    import torch

    from svdconvert.storage.reader import WeightReader

    layout = layout_of(source.config)
    count = len(layout.indices((2, 2)))
    if not count:
        return None
    with WeightReader(source) as reader:
        for module in source.config["svd_ranks"]:
            for name in stored_names(source.config, row.prefix, module)[-count:]:
                info = source.tensors[name]
                if not layout.sound(reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))):
                    return name
    return None


def refuse_unsound(source: Source, row: Architecture) -> None:
    """InputError that names the first tensor of :func:`unsound`."""
    name = unsound(source, row)
    if name is not None:
        raise InputError(
            f"{name} of {source.where} is not a {layout_of(source.config).index_rule}: something has changed it (by "
            "averaging two conversions, say); convert the model again"
        )

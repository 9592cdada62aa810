"""What a checkpoint holds beside its language model, where that is a part of a model that sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.tower import Tower
from svdconvert.families.towers import tower_of
from svdconvert.tensors import TensorInfo


@dataclass(frozen=True)
class Whole:
    """A model that sees, as its files have it.

    Attributes:
        tower: what it is.
        where: the checkpoint, for messages.
        config: its config.json.
        names: the language model's own name of a tensor -> its name in the files.
        prefix: of the language model's tensors in the files.
        rest: every other tensor, by its name in the files.
    """

    tower: Tower
    where: str
    config: Mapping[str, Any]
    names: Mapping[str, str]
    prefix: str
    rest: Mapping[str, TensorInfo]

    @property
    def size(self) -> int:
        """Parameters beside the language model."""
        return sum(info.size for info in self.rest.values())

    def written(self, name: str) -> str:
        """Name in files of a tensor of the language model, dense or factored."""
        if name in self.names:
            return self.names[name]
        row = self.tower.text
        return self.prefix + name.removeprefix(row.prefix) if name.startswith(row.prefix) else name

    def note(self) -> str:
        """What is done with it, for the user."""
        return (
            f"{self.where} sees: its language model alone is worked on and measured, and the "
            f"{len(self.rest)} tensors of {' and '.join(self.tower.vision)} stay as they are"
        )


def language_tensors(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any], where: str
) -> tuple[dict[str, TensorInfo], Whole | None]:
    """The tensors of the language model in a checkpoint by their own names, and what is beside it.

    Args:
        tensors: of the checkpoint, by name.
        config: its config.json.
        where: the checkpoint, for messages.

    Raises:
        InputError: it holds no language model.
    """
    tower = tower_of(config)
    if tower is None:
        return dict(tensors), None
    row = tower.text
    prefix = next((one for one in tower.prefixes if any(name.startswith(one) for name in tensors)), None)
    if prefix is None:
        raise InputError(
            f"{where} has no tensors named {'... or '.join(tower.prefixes)}..., so its language model is not there; "
            f"save the whole {tower.dense_class} with save_pretrained"
        )
    own = {name: row.prefix + name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    own |= {name: row.head[0] for name in tower.heads if name in tensors}
    found = {new: replace(tensors[name], name=new) for name, new in own.items()}
    rest = {name: info for name, info in tensors.items() if name not in own}
    return found, Whole(tower, where, config, {new: name for name, new in own.items()}, prefix, rest)

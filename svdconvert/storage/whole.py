"""What a checkpoint holds beside its language model, where that is a part of a model that sees."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.errors import InputError
from svdconvert.families.tower import LANGUAGE_MODEL, Tower
from svdconvert.families.towers import tower_of
from svdconvert.tensors import TensorInfo


@dataclass(frozen=True)
class Whole:
    """A model that sees, as its files have it.

    Attributes:
        tower: what it is.
        where: the checkpoint, for messages.
        config: its config.json.
        names: the language model's own name of a tensor -> its name in files of the whole.
        stored: the same -> its name in these files, which lacks a prefix where they are of the model without its head.
        prefix: of the language model's tensors in files of the whole.
        rest: every other tensor, by its name in files of the whole.
    """

    tower: Tower
    where: str
    config: Mapping[str, Any]
    names: Mapping[str, str]
    stored: Mapping[str, str]
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

    def own(self, name: str) -> str | None:
        """The reverse: the language model's own name of a tensor in files, dense or factored; None of one beside it."""
        row = self.tower.text
        if name in self.tower.heads:
            return row.head[0]
        if name in self.rest or not name.startswith(self.prefix):
            return None
        return row.prefix + name.removeprefix(self.prefix)

    def in_files(self, tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """All tensors of the whole by their names in files, given those of the language model by its own."""
        return {self.written(name): info for name, info in tensors.items()} | dict(self.rest)

    def in_memory(self, name: str) -> str:
        """What transformers calls a tensor of the language model in memory, by its name here or in files."""
        row = self.tower.text
        for prefix in (self.prefix, row.prefix):
            if name.startswith(prefix):
                return f"model.{LANGUAGE_MODEL}.{name.removeprefix(prefix)}"
        return row.head[0] if name in self.tower.heads else name

    def of_memory(self, name: str) -> str:
        """The reverse: the name here of a tensor of the language model, that in files of another one.

        Versions of transformers differ in a level of vision towers that have one module.
        """
        inner = f"model.{LANGUAGE_MODEL}."
        if name.startswith(inner):
            return self.tower.text.prefix + name.removeprefix(inner)
        beside = {self.beside_in_memory(stored): stored for stored in self.rest}
        return beside.get(_bare(name), name)

    def beside_in_memory(self, name: str) -> str:
        """What transformers calls a tensor in files that is not the language model's, without that level."""
        for pattern, new in self.tower.renames:
            name = re.sub(pattern, new, name)
        return _bare(name)

    def note(self) -> str:
        """What is done with it, for the user."""
        return (
            f"{self.where} sees: its language model alone is worked on and measured, and the "
            f"{len(self.rest)} tensors of {' and '.join(self.tower.vision)} stay as they are"
        )


def _bare(name: str) -> str:
    return name.replace(".vision_model.", ".")


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
    stored = {name: name for name in tensors}
    prefix = _prefix(tower, stored)
    if prefix is None and any(name.startswith(f"{LANGUAGE_MODEL}.") for name in tensors):  # saved without the head
        stored = {f"model.{name}": name for name in tensors}
        prefix = _prefix(tower, stored)
    if prefix is None:
        raise InputError(
            f"{where} has no tensors named {'... or '.join(tower.prefixes)}..., so its language model is not there; "
            f"save the whole {tower.dense_class} with save_pretrained"
        )
    own = {name: row.prefix + name.removeprefix(prefix) for name in stored if name.startswith(prefix)}
    own |= {name: row.head[0] for name in tower.heads if name in stored}
    found = {new: replace(tensors[stored[name]], name=new) for name, new in own.items()}
    names = {new: name for name, new in own.items()}
    files = {new: stored[name] for new, name in names.items()}
    rest = {name: tensors[file] for name, file in stored.items() if name not in own}
    return found, Whole(tower, where, config, names, files, prefix, rest)


def _prefix(tower: Tower, names: Iterable[str]) -> str | None:
    return next((one for one in tower.prefixes if any(name.startswith(one) for name in names)), None)

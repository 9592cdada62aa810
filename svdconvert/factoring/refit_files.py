"""Refitted factors, kept as files, and how the refit that made them ended."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.fields import COUNT, FLAG, NUMBER, require
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import read_json
from svdconvert.storage.tensor_files import read_note, read_tensors, sealed, unseal, write_tensors

# What to do about a damaged file of the work folder.
_AGAIN = "delete the folder it is in, then the same command computes it again"


@dataclass(frozen=True)
class Refit:
    """What a refit came to, as losses of the held-out sequences in nats per token.

    Attributes:
        dense: the dense model's.
        truncated: that of the truncation.
        refitted: that of the refitted model.
        tokens: tokens that the regressions saw.
        compensated: whether targets made good what the layers before had lost.
    """

    dense: float
    truncated: float
    refitted: float
    tokens: int
    compensated: bool

    @property
    def accepted(self) -> bool:
        """Whether the refitted factors are better."""
        return self.refitted < self.truncated

    def __str__(self) -> str:
        """A sentence for the user."""
        change = f"{self.truncated:.4f} to {self.refitted:.4f} nats per token on held-out text (dense {self.dense:.4f})"
        if self.accepted:
            return f"the refit brought the loss from {change}"
        return f"the refit would have brought the loss from {change}, so the truncation's own factors are kept"


_OUTCOME = {"dense": NUMBER, "truncated": NUMBER, "refitted": NUMBER, "tokens": COUNT, "compensated": FLAG}


class RefitFolder:
    """Refitted factors on disk, a file for each target; a file that is there is finished."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._outcome = folder / "refit.json"

    @property
    def outcome(self) -> Refit | None:
        """How the refit ended, if it has."""
        if not self._outcome.is_file():
            return None
        document = unseal(read_json(self._outcome, "", _AGAIN), self._outcome)
        require(document, _OUTCOME, self._outcome, _AGAIN)
        return Refit(**{name: document[name] for name in _OUTCOME})

    def finish(self, outcome: Refit) -> None:
        """Keep how it ended."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self._outcome, sealed(asdict(outcome)))

    def path(self, module: str) -> Path:
        """File of one target."""
        return self._folder / f"{module}.safetensors"

    def save(self, module: str, tensors: Sequence[Tensor], report: Mapping[str, Any]) -> None:
        """Write one target's file, whole or not at all."""
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        named = {str(place): tensor for place, tensor in enumerate(tensors)}
        write_tensors(self.path(module), named, json.dumps(report))


def load_refitted(path: Path) -> tuple[list[Tensor], dict[str, Any]]:
    """``(the tensors of a target's layout, their report)``."""
    tensors = read_tensors(path)
    return [tensors[str(place)] for place in range(len(tensors))], json.loads(read_note(path))

"""Which matrices are factored, and in what units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.row import option


def patterns_of(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Patterns as a caller gives them; a text is one pattern.

    Raises:
        InputError: one of them is no text.
    """
    if isinstance(targets, str):
        return (targets,)
    found = tuple(targets) if isinstance(targets, Iterable) else (targets,)
    if not all(isinstance(one, str) for one in found):
        raise InputError(f"{asked('targets', targets)} is no list of patterns; write for example ['attention.dense']")
    return found


@dataclass(frozen=True)
class Scope:
    """The targets.

    Attributes:
        targets: patterns that choose among the architecture's linear layers; empty chooses all of them.
        split_fused: whether queries, keys and values that are one matrix are factored as three.
        share_layers: consecutive layers that share the input-side factor of each kind of matrix.
        share_experts: whether the experts of a layer share that of each kind of matrix that reads hidden states.
    """

    targets: Sequence[str] = option(
        (),
        "--targets",
        "Factor only linear layers that match (repeatable).",
        keyword="targets",
        group="What to factor",
        metavar="PATTERN",
        usual="the linear layers of every block",
        repeatable=True,
        read=patterns_of,
        write=list,
    )
    split_fused: bool = option(
        False,
        "--split-fused",
        "Factor queries, keys and values that are one matrix as three.",
        keyword="split_fused",
        group="What to factor",
        kind="flag",
    )
    share_layers: int = option(
        1,
        "--share-layers",
        "Consecutive layers that share the input-side factor of each kind of matrix, stored once.",
        keyword="share_layers",
        group="What to factor",
        kind="whole",
    )
    share_experts: bool = option(
        False,
        "--share-experts",
        "Experts of a layer share the input-side factors of what reads hidden states, each stored once.",
        keyword="share_experts",
        group="What to factor",
        kind="flag",
    )

    @property
    def shared(self) -> str:
        """What is asked for that makes matrices share a factor, for messages; empty if nothing is."""
        if self.share_layers != 1:
            return asked("share_layers", self.share_layers)
        return asked("share_experts", True) if self.share_experts else ""

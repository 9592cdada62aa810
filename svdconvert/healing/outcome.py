"""How a healing ended: the factors in a file, and what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport
from svdconvert.models.head_divergence import HeadDivergence
from svdconvert.nats import perplexity
from svdconvert.storage.disk import disk_errors
from svdconvert.storage.tensor_files import read_note, write_tensors


@dataclass(frozen=True)
class Judged:
    """A model on the held-out sequences, in nats per predicted token.

    Attributes:
        kl: KL(dense || model).
        added: loss that it has above the dense model's.
    """

    kl: float
    added: float

    @classmethod
    def of(cls, sums: HeadDivergence) -> Judged:
        """The means of sums."""
        return cls(sums.kl / sums.tokens, (sums.other - sums.reference) / sums.tokens)


@dataclass(frozen=True)
class Healed:
    """How a healing ended.

    Attributes:
        changed: whether the trained factors are better; the start's are kept otherwise.
        before, after: the start, and the result, with the tensors as they are stored, in float32.
        dense_loss: the dense model's loss on the held-out sequences, nats per token.
        held_out_tokens: predicted tokens there.
        tokens: tokens that were trained on, each of them once for every time.
        steps: of the optimiser, trials aside.
        best_step: after which of them the factors are those of the result; 0 where they are the start's.
        lr: highest learning rate; None where the model fell apart at all of them.
        batch_size: sequences of a step.
        anchor, hints: see :class:`svdconvert.settings.healing.Healing`.
        precision: of the matrix products in training.
        processes: that shared the sequences of a step.
        blocks: of a healing block by block, steps, learning rate, and error of its outputs before and after, of each.
        trials, checks: see :class:`svdconvert.healing.state.State`.
        trained: numbers that were trained, of ``factors`` and of ``scales``.
        matrices: module path -> what is known of its factors now.
        rounded: module path -> what is known now of a matrix that is dense in few bits.
    """

    changed: bool
    before: Judged
    after: Judged
    dense_loss: float
    held_out_tokens: int
    tokens: int
    steps: int
    best_step: int
    lr: float | None
    batch_size: int
    anchor: float
    precision: str
    hints: float = 0.0
    processes: int = 1
    blocks: Sequence[Mapping[str, float | None]] = ()
    trials: Sequence[Mapping[str, float | None]] = ()
    checks: Sequence[Mapping[str, float | None]] = ()
    trained: Mapping[str, int] = field(default_factory=lambda: {"factors": 0, "scales": 0})
    matrices: Mapping[str, MatrixReport] = field(default_factory=dict)
    rounded: Mapping[str, RoundedReport] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """What was trained, in words."""
        return " and ".join(name for name in ("factors", "scales") if self.trained[name])

    def to_json(self) -> dict[str, Any]:
        """All but the matrices, in JSON types, with perplexities."""
        told = {name: value for name, value in asdict(self).items() if name not in ("matrices", "rounded")}
        for name, judged in (("before", self.before), ("after", self.after)):
            told[name]["perplexity"] = _number(self.dense_loss + judged.added)
        return {
            **told,
            "dense_perplexity": _number(self.dense_loss),
            "trials": [*self.trials],
            "checks": [*self.checks],
            "blocks": [*self.blocks],
            "trained": dict(self.trained),
        }

    def __str__(self) -> str:
        """A sentence for the user."""
        on = f"on {self.held_out_tokens:,} held-out tokens"
        if not self.changed:
            return (
                f"training does not bring the {self.what} nearer to the dense model {on}, so they are kept as they "
                f"were (KL {self.before.kl:.4f})"
            )
        losses = (self.dense_loss + added for added in (0.0, self.before.added, self.after.added))
        dense, *perplexities = map(perplexity, losses)
        return (
            f"healing brought KL(dense || model) from {self.before.kl:.4f} to {self.after.kl:.4f} {on}, and the "
            f"perplexity from {perplexities[0]:.2f} to {perplexities[1]:.2f} (dense {dense:.2f})"
        )


def _number(loss: float) -> float | None:
    """A perplexity in JSON types, which have no infinity."""
    found = perplexity(loss)
    return found if math.isfinite(found) else None


def write_healed(path: Path, healed: Healed, factors: Mapping[str, Tensor]) -> None:
    """Keep the result.

    Raises:
        JobError: the disk fails.
    """
    told = asdict(healed)
    for name in ("matrices", "rounded"):
        told[name] = {module: report.to_json() for module, report in getattr(healed, name).items()}
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, factors, json.dumps(told))


def read_healed(path: Path) -> Healed | None:
    """What :func:`write_healed` kept; None if there is no such file.

    Raises:
        InputError: it is damaged.
    """
    if not path.is_file():
        return None
    told = json.loads(read_note(path))
    return Healed(
        **told
        | {
            "before": Judged(**told["before"]),
            "after": Judged(**told["after"]),
            "matrices": {name: MatrixReport.from_json(matrix) for name, matrix in told["matrices"].items()},
            "rounded": {name: RoundedReport.from_json(matrix) for name, matrix in told["rounded"].items()},
        }
    )

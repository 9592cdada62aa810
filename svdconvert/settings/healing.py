"""How factors are trained to the dense model."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.output import Output
from svdconvert.settings.row import SPEED, option, options_of
from svdconvert.settings.runtime import Runtime
from svdconvert.settings.text import LABELS, Stats, Text, refused

# The whole model is trained at once, or one block after the other.
WAYS = ("end-to-end", "blocks")
PRECISIONS = ("auto", "float32", "bfloat16")
# Of these three are tried where no learning rate is given: those in the middle, and that beside the better of both.
RATES = (3e-5, 1e-4, 3e-4, 1e-3)
# Tokens of a step where no batch size is given.
STEP_TOKENS = 2048


@dataclass(frozen=True)
class Healing:
    """The training.

    Attributes:
        epochs: times that the text is gone through; None for once, or as ``steps`` say.
        steps: steps of the optimiser; None for what ``epochs`` comes to.
        batch_size: sequences of a step; None for as many as have :data:`STEP_TOKENS` tokens.
        lr: highest learning rate; None for one of :data:`RATES`, by three short trials.
        anchor: share of its distance from the start, times the learning rate, by which a factor or a scale goes back at
            each step.
        hints: weight of the distance of hidden states beside the divergence of predictions, end to end.
        precision: type of the matrix products, one of :data:`PRECISIONS`.
        how: one of :data:`WAYS`.
    """

    epochs: float | None = option(
        None,
        "--epochs",
        "Times that the text is gone through.",
        keyword="epochs",
        group="Healing",
        kind="number",
        usual="once",
    )
    steps: int | None = option(
        None,
        "--steps",
        "Instead: steps of the optimiser.",
        keyword="steps",
        group="Healing",
        kind="count",
    )
    batch_size: int | None = option(
        None,
        "--batch-size",
        "Sequences of a step.",
        keyword="batch_size",
        group="Healing",
        kind="count",
        usual=f"as many as have {STEP_TOKENS} tokens",
    )
    lr: float | None = option(
        None,
        "--lr",
        "Highest learning rate.",
        keyword="lr",
        group="Healing",
        kind="number",
        usual="one of 3e-5 to 1e-3, by three short trials",
    )
    anchor: float = option(
        0.0,
        "--anchor",
        "Pull of the factors towards their start: X times the learning rate of the distance at each step.",
        keyword="anchor",
        group="Healing",
        kind="number",
    )
    hints: float = option(
        0.0,
        "--hints",
        "Weight of the distance to the dense model's hidden states at four depths, relative to their length, beside "
        "the divergence of predictions, such as 10.",
        keyword="hints",
        group="Healing",
        kind="number",
    )
    precision: str = option(
        "auto",
        "--precision",
        "Type of the matrix products, auto: bfloat16 where the device computes in it; what is trained, and what "
        "decides, is float32.",
        keyword="precision",
        group="Healing",
        kind="choice",
        words=PRECISIONS,
        omitted_because=SPEED,
    )

    how: str = option(
        "end-to-end",
        "--how",
        "Train the whole model to the dense one's predictions, or one block after the other to the outputs of that "
        "one's blocks, which wins less and has one block in memory.",
        keyword="how",
        group="Healing",
        kind="choice",
        words=WAYS,
    )

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            InputError: a number is impossible.
        """
        if self.epochs is not None and self.steps is not None:
            raise InputError(f"{asked('steps')} and {asked('epochs')} say how long to train; give one of them")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{asked(name, value)} must be above 0 and finite")
        for name in ("anchor", "hints"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{asked(name, getattr(self, name))} must be 0 or above, and finite")
        if self.how == "blocks" and self.hints:
            raise InputError(
                f"{asked('hints', self.hints)} has no effect with {asked('how', 'blocks')}, which trains on hidden "
                "states alone; leave it out"
            )
        for name, words in (("precision", PRECISIONS), ("how", WAYS)):
            if getattr(self, name) not in words:
                *others, last = words
                known = f"{', '.join(others)} or {last}"
                raise InputError(f"{asked(name, getattr(self, name))} is unknown; choose {known}")

    def batch(self, length: int) -> int:
        """Sequences of a step, of so many tokens each."""
        return self.batch_size or max(1, STEP_TOKENS // length)

    def total_steps(self, sequences: int, batch: int) -> int:
        """Steps of the optimiser.

        Args:
            sequences: that are trained on.
            batch: sequences of a step.
        """
        epochs = 1.0 if self.epochs is None else self.epochs
        return self.steps or max(1, round(epochs * sequences / batch))


@dataclass(frozen=True)
class HealRequest:
    """A request to heal a factored model, without the models and the folder of the result.

    Attributes:
        calibration: the text to train on.
        healing: how.
        output: what is written.
        runtime: where the work is done.
    """

    calibration: Text
    healing: Healing = field(default_factory=Healing)
    output: Output = field(default_factory=Output)
    runtime: Runtime = field(default_factory=Runtime)

    @classmethod
    def of(cls, calibration: Any, **keywords: Any) -> HealRequest:
        """A request by the keywords of :func:`svdconvert.heal`.

        Raises:
            InputError: a value cannot be read, or no text is given.
        """
        if not isinstance(calibration, Text):
            raise refused(calibration)
        sections: dict[type, dict[str, Any]] = {Healing: {}, Output: {}, Runtime: {}}
        for section, values in sections.items():
            for name, row in options_of(section).items():
                if row.keyword in keywords:
                    values[name] = row.given(keywords.pop(row.keyword))
        assert not keywords, keywords
        return cls(calibration, Healing(**sections[Healing]), Output(**sections[Output]), Runtime(**sections[Runtime]))

    def check(self) -> None:
        """Refuse a request that no model can meet.

        Raises:
            InputError: a value is impossible, or has no effect.
        """
        self.healing.check()
        if self.calibration.labels != LABELS[0]:
            raise InputError(
                f"{asked('calibration.labels', self.calibration.labels)} has no effect on healing, which trains on the "
                "dense model's predictions; leave it out"
            )

    def key(self, text: Mapping[str, Any], precision: str) -> dict[str, Any]:
        """What the result depends on beside the models, in JSON types: what a job resumes under.

        Args:
            text: what tells the sequences apart from others.
            precision: that is computed in.
        """
        chosen = {name: getattr(self.healing, name) for name in options_of(Healing)}
        return {
            **chosen,
            "precision": precision,
            "sequences_at_a_time": self.calibration.batch_size,
            **text,
            "max_shard_bytes": self.output.max_shard_bytes,
        }

    def command(self, text: Text | Stats) -> str:
        """The command that makes the same request; stand-ins take the place of the models.

        Args:
            text: with a stand-in for a file's name, and with actual numbers.
        """
        words = ["svdconvert", "heal", "DIR", "--against", "MODEL"]
        for section in (text, self.healing, self.output):
            for name, row in options_of(section).items():
                if not row.omitted_because:
                    words += row.command(getattr(section, name))
        return shlex.join([*words, "--out", "DIR2"])

"""What can be had of a model: ways to store it, what each costs, and advice that follows from these figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from svdconvert.reports.figures import rounded
from svdconvert.words import size as in_words

# What kinds of ways there are, and what their lines are called in a picture.
DENSE, EVEN, RANK, BYTES = "dense", "all alike", "rank alone", "rank and bits"
# Rank alone that multiplies the perplexity by more than this is not to be used as it is.
BEARABLE = 1.1


@dataclass(frozen=True)
class Way:
    """One way to store a model.

    Attributes:
        name: for people.
        kind: ``dense``, ``all alike``, ``rank alone`` or ``rank and bits``.
        options: of ``svdconvert convert``, which make it; empty for what that does not make.
        bytes: of the weight files.
        params: parameters of the whole model.
        products: matrices of low rank.
        bits: width -> number of matrices; the model's own type is 16.
        predicted: nats per token that it is estimated to add to the loss.
        prompt, answer: multiplications in linear layers for a token of a prompt, and of the answer.
        read_bytes: bytes of weights that are read for a token of the answer.
        training_bytes: memory of full fine-tuning by AdamW, without activations; None where weights are in few bits.
        fits: whether the weights have room on the device; None where there is none.
        added: log-perplexity on top of the dense model's, nats per token; None where it was not measured.
        kl: KL(dense || this), nats per token, likewise.
        command: the whole command that makes it, of the model and the text that were given; empty as ``options`` is.
    """

    name: str
    kind: str
    options: str
    bytes: int
    params: int
    products: int
    bits: dict[int, int]
    predicted: float
    prompt: int
    answer: int
    read_bytes: int
    training_bytes: int | None
    fits: bool | None = None
    added: float | None = None
    kl: float | None = None
    command: str = ""

    @property
    def loss(self) -> float:
        """KL where it was measured, else what is predicted."""
        return self.predicted if self.kl is None else self.kl


@dataclass(frozen=True)
class Options:
    """Result of :func:`options`.

    Attributes:
        model: that they are of.
        calibration: the text that predictions come of.
        matrices: that may be rounded or factored.
        ways: of each kind from many bytes to few.
        text: what was measured on; None where nothing was.
        tokens: predicted there; 0 where nothing was.
        perplexity: of the dense model there; None where nothing was measured.
        room: what the device's memory goes to; None without one.
    """

    model: str
    calibration: str
    matrices: int
    ways: Sequence[Way]
    text: str | None = None
    tokens: int = 0
    perplexity: float | None = None
    room: str | None = None

    @property
    def dense(self) -> Way:
        """The model as it is."""
        return self.of(DENSE)[0]

    @property
    def measured(self) -> bool:
        """Whether the ways were measured."""
        return self.text is not None

    def of(self, kind: str) -> list[Way]:
        """The ways of a kind."""
        return [way for way in self.ways if way.kind == kind]

    @property
    def heads(self) -> tuple[str, ...]:
        """What :meth:`cells` says."""
        measured = ("added", "KL") if self.measured else ()
        device = () if self.room is None else ("fits",)
        return (
            *("weight files", "parameters", "of low rank", "predicted", *measured),
            *("multiplications", "read a token", "fine-tuning", *device),
        )

    def cells(self, way: Way) -> tuple[str, ...]:
        """A way in a table."""

        def nats(loss: float | None, sign: str = "+") -> str:
            return "" if loss is None or way.kind == DENSE else f"{loss:{sign}.4f}"

        return (
            in_words(way.bytes),
            f"{way.params:,}",
            f"{way.products} of {self.matrices}",
            nats(way.predicted),
            *((nats(way.added), nats(way.kl, "")) if self.measured else ()),
            rounded(way.answer),
            in_words(way.read_bytes),
            "adapters" if way.training_bytes is None else in_words(way.training_bytes),
            *(() if way.fits is None else ("yes" if way.fits else "no",)),
        )

    @property
    def about(self) -> str:
        """What the figures come of."""
        measured = ""
        if self.text is not None:
            measured = (
                f"; added log-perplexity and KL(dense || this) measured on {self.tokens:,} tokens of {self.text} "
                f"(dense: perplexity {self.perplexity:.2f})"
            )
        return (
            f"losses in nats per token, predicted from {self.calibration}{measured}; multiplications and bytes of "
            "weights for a token of the answer; fine-tuning of all parameters by AdamW, without activations"
        )

    @property
    def advice(self) -> list[str]:
        """What follows, in a few sentences."""
        return [*self._about_bytes(), *self._about_multiplications(), *self._about_the_device()]

    def to_json(self) -> dict[str, Any]:
        """The result in JSON types."""
        return {**asdict(self), "ways": [asdict(way) for way in self.ways], "advice": self.advice}

    def _said(self, way: Way) -> str:
        return f"{'KL' if self.measured else 'predicted loss'} {way.loss:.4f}"

    def _about_bytes(self) -> list[str]:
        ranked = self.of(RANK)
        low = min(ranked, key=lambda way: way.bytes, default=None)
        bits = [way for way in (*self.of(EVEN), *self.of(BYTES)) if low is not None and way.bytes <= low.bytes]
        if low is None or not bits:
            return []
        best = min(bits, key=lambda way: way.loss)
        theirs, ours = (f"{way.name} ({in_words(way.bytes)}, {self._said(way)})" for way in (best, low))
        sentences = [
            f"For fewer bytes alone take bits: {theirs} is closer to the dense model than {ours}, in no more bytes."
            if best.loss <= low.loss
            else f"For fewer bytes, rank alone is at least as good as bits here: {ours}, against {theirs}."
        ]
        smallest = min(self.of(BYTES), key=lambda way: way.bytes, default=None)
        if smallest is not None:
            sentences.append(
                f"Low rank as a means to save bytes is chosen for {smallest.products} of {self.matrices} matrices at "
                f"the smallest budget, {smallest.name}."
            )
        return sentences

    def _about_multiplications(self) -> list[str]:
        ranked = self.of(RANK)
        if not ranked:
            return []
        shares = " and ".join(f"{way.prompt / self.dense.prompt:.0%}" for way in ranked)
        losses = " and ".join(self._said(way) for way in ranked)
        sentences = [
            f"Fewer multiplications, and less memory in full fine-tuning, come of rank alone: {shares} of them, at "
            f"{losses}; bits save none."
        ]
        dear = [way for way in ranked if math.exp(_loss_of(way)) > BEARABLE]
        if len(dear) == len(ranked):
            factor = math.exp(_loss_of(min(ranked, key=_loss_of)))
            sentences.append(
                f"Even the larger of them multiplies the perplexity by {factor:.2f}: low rank is the wrong tool for "
                "this model, unless it is healed or fine-tuned afterwards."
            )
        elif dear:
            factor = math.exp(_loss_of(max(ranked, key=_loss_of)))
            sentences.append(f"The smaller multiplies the perplexity by {factor:.2f}; heal or fine-tune it.")
        return sentences

    def _about_the_device(self) -> list[str]:
        fitting = [way for way in self.ways if way.fits]
        if self.room is None:
            return []
        if not fitting:
            return ["None of these fits the device; give more memory, or fewer tokens of context."]
        best = min(fitting, key=lambda way: (way.loss, way.bytes))
        return [
            f"Of those that fit the device, {best.name} is closest to the dense model ({self._said(best)}); weights of "
            "few bits take so little only where an engine computes with packed weights."
        ]


def _loss_of(way: Way) -> float:
    """What is added to the log-perplexity: measured, or predicted."""
    return way.predicted if way.added is None else way.added

"""Measuring what ranks would cost, from decompositions and without writing a model.

The dense model's last hidden states are computed once; for every choice of ranks the held-out sequences go through the
compressed blocks, one block in memory at a time, and the head compares both. Every finished trial is kept in a small
file, so that an interrupted search, or another one over the same decompositions, does not repeat it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from svdconvert.factoring.sampled import Bench, Sampled
from svdconvert.factoring.samples import held_out_sample
from svdconvert.fields import COUNT, NUMBER
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step


@dataclass(frozen=True)
class Trial:
    """What some ranks cost on held-out sequences, in nats per predicted token.

    Attributes:
        kl: mean KL(dense || compressed).
        added: loss beyond the dense model's.
        dense: the dense model's loss.
        tokens: number of predicted tokens.
    """

    kl: float
    added: float
    dense: float
    tokens: int


_TRIAL = {"kl": NUMBER, "added": NUMBER, "dense": NUMBER, "tokens": COUNT}


class Trials:
    """Trials of one model, text and set of decompositions."""

    def __init__(self, bench: Bench) -> None:
        """Prepare; nothing is computed before a trial needs it.

        Raises:
            InputError: there are too few sequences.
        """
        self._bench = bench
        self._sampled = Sampled(bench, held_out_sample(bench.tokens), bench.batch_size, "held-out")

    def measure(self, targets: Sequence[Target], steps: Sequence[Step], name: str) -> Trial:
        """What ranks cost.

        Args:
            targets: all targets, with their ranks.
            steps: of the plan with these ranks.
            name: of the trial, for the progress.

        Raises:
            InputError: something is NaN or infinite, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        key = self._sampled.key(steps)
        found = self._bench.kept(key, _TRIAL, lambda: asdict(self._measured(targets, steps, name)))
        return Trial(**{field: found[field] for field in _TRIAL})

    def _measured(self, targets: Sequence[Target], steps: Sequence[Step], name: str) -> Trial:
        dense = self._sampled.dense
        compressed = self._sampled.compressed(targets, steps, name, keep=False)
        with self._bench.blocks.head() as head:
            sums = compressed.divergence(head, dense)
        compressed.store.clear()
        count = sums.tokens
        return Trial(sums.kl / count, (sums.other - sums.reference) / count, sums.reference / count, count)

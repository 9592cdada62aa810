"""A softmax over a vocabulary whose scores come in parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class RunningSums:
    """The sums that a softmax divides by, of all scores so far.

    After each part they are brought to the highest score of all so far, as in an online softmax (Milakov and
    Gimelshein, https://arxiv.org/abs/1805.02867), so nothing overflows.

    Attributes:
        highest: [n, 1], the highest score.
        sums: [n, 1], the sum of exp(score - highest).
        scaled: [n, 1], what the last part has multiplied earlier sums with.
    """

    def __init__(self, like: Tensor) -> None:
        """Begin without scores.

        Args:
            like: [n, ...], of the type and device of the scores.
        """
        self.highest = like.new_full((len(like), 1), -torch.inf)
        self.sums = like.new_zeros(len(like), 1)
        self.scaled = like.new_ones(len(like), 1)

    def add(self, scores: Tensor) -> Tensor:
        """Add a part.

        Args:
            scores: [n, tokens], finite.

        Returns:
            exp(score - highest) of each, [n, tokens].
        """
        highest = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        found = (scores - highest).exp_()
        self.scaled = (self.highest - highest).exp_()
        self.sums = self.sums * self.scaled + found.sum(-1, keepdim=True)
        self.highest = highest
        return found

    def logarithms(self) -> Tensor:
        """[n, 1] float64, the logarithm of the sum of exp(score)."""
        return self.sums.double().log() + self.highest


class Labels:
    """Known labels, and where they lie in scores that come in parts."""

    def __init__(self, labels: Tensor, parts: Sequence[slice]) -> None:
        """Prepare.

        Args:
            labels: [n] int64.
            parts: the labels that each part has scores of.
        """
        self._labels, self._parts = labels, parts

    def within(self, number: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The labels that lie in a part; see :meth:`Draws.within`."""
        part = self._parts[number]
        rows = ((self._labels >= part.start) & (self._labels < part.stop)).nonzero()[:, 0]
        return rows, self._labels[rows] - part.start


class Draws:
    """Labels that are drawn from a softmax, by inverting its distribution function."""

    def __init__(self, uniform: Tensor, masses: Tensor) -> None:
        """Prepare.

        Args:
            uniform: [n] in [0, 1), float64.
            masses: [n, parts] float64, the logarithm of the sum of exp(score) in each part; of a single one any number.
        """
        self._uniform, self._masses = uniform, masses

    def within(self, number: int, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The labels that lie in a part.

        Args:
            number: of the part.
            scores: of it, [n, tokens].

        Returns:
            ``(the rows whose labels it has, the places of these labels in it)``, [k] int64 each.
        """
        shares = torch.softmax(self._masses, -1)
        upto = shares.cumsum(-1)
        rows = (_inverted(upto, self._uniform) == number).nonzero()[:, 0]
        share, end = shares[rows, number], upto[rows, number]
        left = (self._uniform[rows] * upto[rows, -1] - (end - share)) / share  # of a single part, what it was
        return rows, draw(scores[rows], left.clamp_(0, 1))


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One label per row of [n, vocabulary] logits, by inverting the distribution function at ``uniform`` [n]."""
    return _inverted(torch.softmax(logits.double(), dim=-1).cumsum(dim=-1), uniform)


def _inverted(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """The first place of each row [n, m] whose value is above ``uniform`` [n] of the last one."""
    # Rounding may leave the total below 1.
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0].clamp_(
        max=cumulative.shape[-1] - 1
    )

"""One row per method: the statistics it needs, and the pair of metrics that it computes from them.

Every method is the same problem, min tr(L (W - BA) R (W - BA)^T), in another pair (L, R); see ``linalg/exact.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from svdconvert.errors import InputError
from svdconvert.sentences import asked

if TYPE_CHECKING:
    from torch import Tensor

    from svdconvert.methods.statistics import ModuleStatistics

    Pair = tuple[Tensor | None, Tensor | None]


# What stands beside every predicted loss, of ranks alone and of bits; the figures are in docs/prediction.md and
# docs/rank-or-bits.md.
_OF_RANKS = "an estimate for comparing ranks; down to 60% kept, models that were tried lost 0.5 to 3 times as much"
_OF_BITS = "an estimate; the KL was 1.0 to 1.2 times as much on SmolLM2-135M, and 1.5 times on Gemma 3 270M"


def rough_guess(*, worths: bool) -> str:
    """What a predicted loss is worth.

    Args:
        worths: whether what single matrices lose was measured token by token, as of a budget of bytes.
    """
    return _OF_BITS if worths else _OF_RANKS


@dataclass(frozen=True)
class Method:
    """A way to measure the cost of a truncation.

    Attributes:
        name: as on the command line.
        summary: one line for the user.
        statistics: the statistics it needs of every target; empty for none.
        metrics: (statistics of a target, options) -> (L, R).
        allocation: how a budget is spread by default.
        in_loss: whether the squared singular values estimate twice the loss added, in nats per token, so that those
            of different matrices may be compared.
        options: names of the settings that it reads, with their defaults.
    """

    name: str
    summary: str
    statistics: tuple[str, ...]
    metrics: Callable[[ModuleStatistics, Mapping[str, Any]], Pair]
    allocation: str = "uniform"
    in_loss: bool = False
    options: Mapping[str, float] = field(default_factory=dict)


def shrink(gram: Tensor, amount: float) -> Tensor:
    """Pull a second moment towards its diagonal, (1 - s) C + s diag(C).

    That is the estimate of Ledoit and Wolf (2004) with another target: the scale of every channel is well known, and
    stays, which it would not with a multiple of the identity. It helps beyond the noise of a short text, since a
    truncation meets other inputs and gradients than the dense model's: those of a model that is truncated everywhere.

    Args:
        gram: [n, n].
        amount: s, between 0 and 1.
    """
    import torch

    return gram if amount == 0 else torch.lerp(gram, gram.diagonal().diag(), amount)


# Rounding of float32 products is far below so much of the diagonal.
LEAST_SHRINKAGE = 0.01


def is_shrunk(options: Mapping[str, Any]) -> bool:
    """Whether a method's second moments are shrunk enough to be regular whatever float32 products leave of them."""
    return float(options.get("shrinkage", 0.0)) >= LEAST_SHRINKAGE


def unshrink(gram: Tensor, amount: float) -> Tensor:
    """Undo :func:`shrink`, for an amount below 1."""
    import torch

    return gram if amount == 0 else torch.lerp(gram.diagonal().diag(), gram, 1 / (1 - amount))


def _none(statistics: ModuleStatistics, options: Mapping[str, Any]) -> Pair:
    return None, None


def _asvd(statistics: ModuleStatistics, options: Mapping[str, Any]) -> Pair:
    assert statistics.input_abs is not None
    # Channels that never fire would vanish from the problem; a floor keeps them in it.
    scale = statistics.input_abs / statistics.input_abs.mean().clamp_min(1e-30)
    return None, scale.clamp_min(1e-6).pow(2 * options["alpha"])


def _fwsvd(statistics: ModuleStatistics, options: Mapping[str, Any]) -> Pair:
    assert statistics.fisher is not None
    scale = statistics.fisher / statistics.fisher.mean().clamp_min(1e-300)
    return None, scale.clamp_min(1e-9)


def _whiten(statistics: ModuleStatistics, options: Mapping[str, Any]) -> Pair:
    assert statistics.input_gram is not None
    return None, shrink(statistics.input_gram, options["shrinkage"])


def _kfac(statistics: ModuleStatistics, options: Mapping[str, Any]) -> Pair:
    assert statistics.input_gram is not None
    assert statistics.output_gram is not None
    return (
        shrink(statistics.output_gram, options["shrinkage"]),
        shrink(statistics.input_gram, options["shrinkage"]),
    )


METHODS: Mapping[str, Method] = {
    row.name: row
    for row in (
        Method("svd", "plain truncated SVD, needs no data", (), _none),
        Method(
            "asvd",
            "inputs weighted by mean(|x|)^alpha (Yuan et al., arXiv:2312.05821)",
            ("input_abs",),
            _asvd,
            options={"alpha": 0.5},
        ),
        Method(
            "fwsvd",
            "inputs weighted by the empirical Fisher information (Hsu et al., arXiv:2207.00112)",
            ("fisher",),
            _fwsvd,
        ),
        Method(
            "whiten",
            "smallest error of the outputs on the calibration text (SVD-LLM, arXiv:2403.07378; DRONE)",
            ("input_gram",),
            _whiten,
            options={"shrinkage": 0.0},  # SVD-LLM's own
        ),
        Method(
            "kfac",
            "smallest estimated loss: inputs and output gradients (Kronecker-factored Fisher, arXiv:1503.05671)",
            ("input_gram", "output_gram"),
            _kfac,
            allocation="global",
            in_loss=True,
            options={"shrinkage": 0.2},  # docs/shrinkage.md
        ),
    )
}

# Other names of rows; a note tells the user which row is used.
METHOD_ALIASES: Mapping[str, str] = {"drone": "whiten", "svd-llm": "whiten"}


def method_named(name: str) -> Method:
    """Look a method up.

    Raises:
        InputError: there is none of that name.
    """
    row = METHODS.get(METHOD_ALIASES.get(name, name))
    if row is None:
        raise InputError(f"{asked('method', name)} is unknown; choose one of {', '.join([*METHODS, *METHOD_ALIASES])}")
    return row


def method_options(row: Method, given: Mapping[str, float | None]) -> dict[str, float]:
    """A method's options, defaults filled in.

    Raises:
        InputError: an option that the method does not have, or a value out of range.
    """
    chosen = dict(row.options)
    for name, value in given.items():
        if value is None:
            continue
        if name not in row.options:
            raise InputError(f"{asked(name)} has no effect on {asked('method', row.name)}; leave it out")
        if not 0 <= value <= 1:
            raise InputError(f"{asked(name, value)} must lie between 0 and 1")
        chosen[name] = value
    return chosen


def calibrated(row: Method, settings: Mapping[str, Any]) -> str:
    """The text that a method used, and its options, in words: ``65,536 tokens, shrinkage 0.1``.

    Args:
        row: the method.
        settings: those of a conversion with a text.
    """
    options = [f"{name} {settings[name]:g}" for name in row.options]
    return ", ".join([f"{settings['tokens']:,} tokens", *options])

"""The model card (README.md) of a healed model."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from svdconvert.commands.card import front_matter, usage
from svdconvert.families.table import Architecture
from svdconvert.healing.outcome import Healed
from svdconvert.names import kind
from svdconvert.nats import perplexity
from svdconvert.storage.source import Source


def healed_card(
    source: Source,
    dense: Source,
    row: Architecture,
    commands: Sequence[str],
    healed: Healed,
    params: int,
) -> str:
    """The card.

    Args:
        source: the factored model that was healed.
        dense: the model that it was made from.
        row: its architecture.
        commands: the command lines that repeat it, one after the other.
        healed: how it ended.
        params: of the result.
    """
    name, origin = source.name.rstrip("/").split("/")[-1], f"the predictions of {dense.name}"
    lines = [
        f"# {name}, healed",
        "",
        f"{source.name}, a model whose linear layers are products of low rank, with its factors trained to {origin}"
        f"{'' if healed.changed else '; that brought no gain, so they are what they were'}. Made by svdconvert.",
        "",
        *healed_lines(healed, params),
        *usage(source, row, source.config["svd_ranks"]),
        "## Made by",
        "",
        "```",
        *commands,
        "```",
        "",
        "`svdconvert.json` holds versions, settings, and what was measured on the way.",
    ]
    return front_matter(source, ["svdconvert", "low-rank", "svd"]) + "\n".join(lines) + "\n"


def healed_lines(healed: Healed, params: int) -> list[str]:
    """What the training was worth, and how far the products are from the dense matrices now.

    Args:
        healed: how it ended.
        params: of the result.
    """
    return [*_figures(healed, params), *_errors(healed)]


def _figures(healed: Healed, params: int) -> list[str]:
    """What the training was worth."""
    rows = [("before", healed.before), ("after", healed.after)]
    which = "block by block" if healed.blocks else f"the factors are those after step {healed.best_step:,}"
    rate = "" if healed.lr is None else f", learning rate {healed.lr:g}"
    return [
        "| | KL(dense ‖ model) | perplexity |",
        "|---|---|---|",
        f"| dense | 0 | {perplexity(healed.dense_loss):.2f} |",
        *(f"| {name} | {one.kl:.4f} | {perplexity(healed.dense_loss + one.added):.2f} |" for name, one in rows),
        "",
        f"Nats per token, on {healed.held_out_tokens:,} held-out tokens of the text, by which the training was judged. "
        f"It took {healed.steps:,} steps of {healed.batch_size} sequences, {healed.tokens:,} tokens{rate}; {which}. "
        f"{params:,} parameters. The factors were fitted to this text: on "
        "texts of other kinds the gain is smaller, so measure it there.",
        "",
    ]


def _errors(healed: Healed) -> list[str]:
    """How far the products are from the dense matrices now, which training lets grow."""
    kinds: dict[str, list[float]] = {}
    for module, report in healed.matrices.items():
        kinds.setdefault(kind(module), []).append(report.relative_error)
    if not kinds:
        return []
    cells = ((name, (min(errors), median(errors), max(errors))) for name, errors in kinds.items())
    return [
        "| ‖W - BA‖ / ‖W‖, lowest / median / highest | |",
        "|---|---|",
        *(f"| {name} | {' / '.join(f'{one:.4f}' for one in three)} |" for name, three in cells),
        "",
    ]

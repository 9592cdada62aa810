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

_INTEGERS = (
    "Of weights in few bits the scales alone were trained: integers, sizes and format are those of before.",
    "",
)


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
        f"{source.name}, a model whose linear layers are {_layers(source)}, with its {healed.what} trained to {origin}"
        f"{'' if healed.changed else '; that brought no gain, so they are what they were'}. Made by svdconvert.",
        "",
        *healed_lines(healed, params),
        *usage(source, row, source.config["svd_ranks"], packed=bool(source.packed)),
        "## Made by",
        "",
        "```",
        *commands,
        "```",
        "",
        "`svdconvert.json` holds versions, settings, and what was measured on the way.",
    ]
    tags = ["svdconvert", *(("low-rank", "svd") if source.config["svd_ranks"] else ())]
    return front_matter(source, [*tags, *(("compressed-tensors",) if source.packed else ())]) + "\n".join(lines) + "\n"


def _layers(source: Source) -> str:
    """What its linear layers are."""
    if not source.packed:
        return "products of low rank"
    return "rounded to few bits" + (", some as products of low rank" if source.config["svd_ranks"] else "")


def healed_lines(healed: Healed, params: int) -> list[str]:
    """What the training was worth, and how far the matrices are from the dense ones now.

    Args:
        healed: how it ended.
        params: of the result.
    """
    return [*_figures(healed, params), *_errors(healed)]


def _figures(healed: Healed, params: int) -> list[str]:
    """What the training was worth."""
    rows = [("before", healed.before), ("after", healed.after)]
    which = "block by block" if healed.blocks else f"the {healed.what} are those after step {healed.best_step:,}"
    rate = "" if healed.lr is None else f", learning rate {healed.lr:g}"
    return [
        "| | KL(dense ‖ model) | perplexity |",
        "|---|---|---|",
        f"| dense | 0 | {perplexity(healed.dense_loss):.2f} |",
        *(f"| {name} | {one.kl:.4f} | {perplexity(healed.dense_loss + one.added):.2f} |" for name, one in rows),
        "",
        f"Nats per token, on {healed.held_out_tokens:,} held-out tokens of the text, by which the training was judged. "
        f"It took {healed.steps:,} steps of {healed.batch_size} sequences, {healed.tokens:,} tokens{rate}; {which}. "
        f"{params:,} parameters. The {healed.what} were fitted to this text: "
        "on texts of other kinds the gain is smaller, so measure it there.",
        "",
        *(_INTEGERS if healed.trained["scales"] else ()),
    ]


def _errors(healed: Healed) -> list[str]:
    """How far products and rounded matrices are from the dense ones now, which training lets grow."""
    kinds: dict[str, list[float]] = {}
    errors = {module: report.relative_error for module, report in healed.matrices.items()}
    errors |= {module: report.relative_error for module, report in healed.rounded.items()}
    for module, error in errors.items():
        kinds.setdefault(kind(module), []).append(error)
    if not kinds:
        return []
    cells = ((name, (min(same), median(same), max(same))) for name, same in kinds.items())
    return [
        f"| ‖W - {'Q' if healed.rounded else 'BA'}‖ / ‖W‖, lowest / median / highest | |",
        "|---|---|",
        *(f"| {name} | {' / '.join(f'{one:.4f}' for one in three)} |" for name, three in cells),
        "",
    ]

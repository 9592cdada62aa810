"""What a user should know about a plan, in one sentence each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from svdconvert.families.row import Architecture
from svdconvert.names import layer_number, suffix
from svdconvert.planning.bits import dense_ways
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.sentences import Sentence, asked
from svdconvert.settings.conversion import Conversion
from svdconvert.solvers.row import Solver
from svdconvert.storage.source import Source
from svdconvert.tensors import TensorInfo
from svdconvert.words import listing, numbered
from svdconvert.words import size as size_text


def plan_notes(
    source: Source,
    row: Architecture,
    dropped: Sequence[str],
    copies: Sequence[TensorInfo],
    targets: Sequence[Target],
    request: Conversion,
    budget: int | None,
) -> list[str]:
    """Notes about a plan.

    Args:
        source: the dense model.
        row: its architecture.
        dropped: names of its tensors that no current model reads.
        copies: heads that must be copies of the embedding.
        targets: all targets, with their ranks.
        request: what is asked for.
        budget: parameters that the target weights may have together; None where ranks were asked for.
    """
    notes, share_layers, multiple = list(source.notes), request.scope.share_layers, request.size.multiple
    smaller = [target for target in targets if len(target.parts) < share_layers]
    if smaller:
        sizes = dict.fromkeys(f"{len(t.parts)} from layer {layer_number(t.module)} on" for t in smaller)
        notes.append(f"groups of fewer than {share_layers} layers: {listing(list(sizes))}")
    if source.config_only:
        notes.append(f"{source.where} has no weights here; the plan was made from config.json alone")
    predictors = [name for name in dropped if row.is_predictor(name)]
    if predictors:
        notes.append(
            f"{len(predictors)} tensors of layers that predict further tokens are left out "
            f"({', '.join(sorted({name.partition('.')[0] for name in predictors}))}.*); transformers does not load them"
        )
    if len(dropped) > len(predictors):
        buffers = [name for name in dropped if not row.is_predictor(name)]
        kinds = sorted({suffix(name.split(".", 1)[-1]) for name in buffers})
        notes.append(
            f"dropped: {numbered(len(buffers), 'legacy buffer')} ({', '.join(kinds)}), which no current model reads"
        )
    if copies:
        notes.append(f"{copies[0].name} is dropped: it must be a copy of the embedding, which is stored once")
    if multiple > 1 and budget is not None:
        left = budget - sum(target.params for target in targets)
        notes.append(
            f"ranks are multiples of {multiple}, which leaves {left:,} parameters of the budget unused "
            f"({left / budget:.1%})"
        )
    dense = [target for target in targets if target.rank is None and not target.rounded]
    for reason in dict.fromkeys(target.reason for target in dense):
        modules = [part.module for target in dense if target.reason == reason for part in target.parts]
        stay = "stays" if len(modules) == 1 else "stay"
        notes.append(f"{numbered(len(modules), 'target')} {stay} dense, {reason}: {listing(modules)}")
    return notes


# A smaller part of a budget that is left over is no news: widths and groups are steps.
UNUSED = 0.05


def unused_note(targets: Sequence[Target], request: Conversion, stored: int, budget: int) -> Sentence | None:
    """That the widths which were asked for cannot use a budget of bytes; None where they can.

    Args:
        targets: all targets, as they are to be stored.
        request: with a size in bytes.
        stored: bytes that they take.
        budget: bytes that they may take.
    """
    size = request.size
    widest = (dense_ways(target, size.chosen_widths)[0] for target in targets)
    below = any((each.rank, each.grids) != (most.rank, most.grids) for each, most in zip(targets, widest, strict=True))
    if below or stored >= (1 - UNUSED) * budget:
        return None
    return Sentence(
        f"{asked('widths', size.widths)} cannot use all that {asked(*size.given)} leaves for the targets: they take "
        f"{size_text(stored)} of {size_text(budget)}; give wider ones to lose less"
    )


def solver_note(steps: Iterable[Step], solver: Solver) -> str | None:
    """How many matrices of a job a solver is tried on; None where there is nothing to say."""
    factored = [step for step in steps if step.kind == "factorize"]
    return solver.planned(sum(step.options.get("solver") == solver.name for step in factored), len(factored))

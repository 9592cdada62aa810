"""What a conversion leaves beside its weights: config, record, card, and the command that makes it again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from svdconvert.calibration.knowledge import Knowledge, default_method
from svdconvert.commands import card
from svdconvert.families.table import dense_architecture
from svdconvert.jobs import model_files
from svdconvert.jobs.job import Job, Reports
from svdconvert.methods.table import Method, method_named
from svdconvert.planning.allocation import chosen_allocation
from svdconvert.planning.plan import Plan
from svdconvert.planning.ranks import RankRequest, Target
from svdconvert.settings.options import BY_NAME, repeating_command
from svdconvert.storage.source import Source


def conversion_job(
    source: Source,
    made: Plan,
    settings: Mapping[str, Any],
    method: Method,
    command: str,
    told: Mapping[str, Any],
    measure: Callable[[], Mapping[str, float]] | None,
) -> Job:
    """The job of a planned conversion.

    Args:
        source: the dense model.
        made: the plan.
        settings: all that the result depends on.
        method: how the matrices are factored.
        command: makes the result again.
        told: what the record says besides.
        measure: gives the losses on the text, once the weights are written; None if they are not measured.
    """
    row = dense_architecture(source.config, source.where)
    config = model_files.factored_config(
        source.config, row, made.ranks, made.settings["dtype"], made.settings["layout"], made.shared
    )
    config.setdefault("torch_dtype", model_files.majority_dtype([step.outputs[0] for step in made.steps]))

    def matrices(reports: Reports) -> dict[str, dict[str, Any]]:
        found = {
            module: dict(report)
            for target in made.targets
            if target.rank is not None
            for module, report in _by_layer(target, reports[target.weight]).items()
        }
        if method.in_loss:  # half of what the second-order estimate sums up to
            found = {name: {**told, "predicted_loss": told["lost"] / 2} for name, told in found.items()}
        return found

    @cache
    def losses() -> Mapping[str, float]:
        return {} if measure is None else measure()

    def details(reports: Reports) -> dict[str, Any]:
        return {
            "params": {"before": made.params_before, "after": made.params_after},
            "bytes": {"before": made.bytes_before, "after": made.bytes_after},
            "dense_targets": {part.module: t.reason for t in made.targets if t.rank is None for part in t.parts},
            "notes": list(made.notes),
            "matrices": matrices(reports),
            **predicted(reports),
            **losses(),
            **told,
        }

    def predicted(reports: Reports) -> dict[str, float]:
        """Loss added by the truncation, in nats per token."""
        if not method.in_loss:
            return {}
        return {"predicted_loss": sum(float(matrix["predicted_loss"]) for matrix in matrices(reports).values())}

    def model_card(reports: Reports) -> str:
        lost = {**predicted(reports), **losses()}
        return card.factored_card(source, made, row, command, settings, matrices(reports), lost)

    return Job(
        steps=made.steps,
        shards=made.shards,
        config=config,
        extra={f"{row.modeling}.py": model_files.modeling_source(row)},
        card=model_card,
        details=details,
    )


def _by_layer(target: Target, report: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Module path -> report of its matrix; the time of a group is spread evenly."""
    if not target.followers:
        return {target.module: report}
    common = {name: value for name, value in report.items() if name != "layers"}
    common["seconds"] = round(report["seconds"] / len(target.parts), 4)
    owner = {part.module: {"shared_with": target.module} for part in target.followers}
    return {
        part.module: {**common, **layer, **owner.get(part.module, {})}
        for part, layer in zip(target.parts, report["layers"], strict=True)
    }


def command_line(
    source: Source,
    made: Plan,
    settings: Mapping[str, Any],
    request: RankRequest,
    knowledge: Knowledge | None,
    *,
    keeps: bool,
) -> str:
    """The command that makes this result again, see :func:`svdconvert.settings.options.repeating_command`."""
    row = method_named(made.method)
    usual = chosen_allocation(row, None, request)
    ranks = [] if request.rank is None else [str(request.rank)]
    values: dict[str, Any] = {
        "--revision": source.commit,
        "--rank": (*ranks, *(f"{pattern}={rank}" for pattern, rank in (request.patterns or {}).items())),
        "--targets": tuple(settings["targets"]),
        # Named wherever there is a text, whatever the usual one may be some day.
        "--method": None if knowledge is None and made.method == default_method(None, None, None) else made.method,
        "--allocation": None if settings["allocation"] == usual == "uniform" else settings["allocation"],
        "--max-shard-size": settings["max_shard_bytes"],
        **{f"--{name}": settings.get(name) for name in ("alpha", "shrinkage")},
        **{name: BY_NAME[name].default for name in BY_NAME if BY_NAME[name].keyword.startswith("calibration.")},
        "--stats": None,
        "--work": "WORK" if keeps else None,
        **(knowledge.options if knowledge else {}),
    }
    same = ("keep", "params", "rank_multiple", "factor_all", "split_fused", "share_layers", "refit", "layout", "solver")
    values |= {f"--{name.replace('_', '-')}": settings[name] for name in (*same, "dtype")}
    return repeating_command(source.repo or source.name, values)

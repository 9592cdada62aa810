"""The model card (README.md) of a result: what it is, what it cost, how to use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from svdconvert.families.fused import split_layers
from svdconvert.families.table import Architecture
from svdconvert.jobs.record import REPORT
from svdconvert.methods.table import METHODS, calibrated, rough_guess
from svdconvert.names import kind, layer_number, suffix
from svdconvert.planning.plan import Plan
from svdconvert.planning.target_kinds import widths_in_words
from svdconvert.solvers.table import SOLVERS
from svdconvert.storage.packed_config import NEEDED
from svdconvert.storage.source import Source

# What was lost, as a card tells it: field of a matrix's record, heading, format, what it is.
_LOSSES = (
    ("relative_error", "weights", ".4f", "weights: ||W - BA|| / ||W||, as stored"),
    (
        "output_error",
        "outputs",
        ".4f",
        "outputs: the relative error of the layer's outputs on the calibration text, before rounding",
    ),
    (
        "predicted_loss",
        "predicted loss",
        ".2g",
        "predicted loss: what the layer is estimated to add, nats per token",
    ),
)


def factored_card(
    source: Source,
    plan: Plan,
    row: Architecture,
    command: str,
    settings: Mapping[str, Any],
    matrices: Mapping[str, Mapping[str, Any]],
    losses: Mapping[str, float],
    budget: str = "",
    *,
    healed: Sequence[str] = (),
    report: bool = False,
) -> str:
    """Card of a factored model.

    Args:
        source: the dense model.
        plan: the conversion.
        row: its architecture.
        command: the command line that repeats it.
        settings: what svdconvert.json tells of them.
        matrices: what svdconvert.json tells about every factored matrix, by module path.
        losses: what it tells of the loss on the calibration text.
        budget: what was measured to choose the ranks, in a sentence; empty where nothing was.
        healed: lines about the healing that followed; none where nothing followed.
        report: whether there is a page about it.
    """
    lines = [
        *_overview(source, plan, settings, matrices, f", {_named(plan)}{' and healed' if healed else ''}"),
        *_sizes(plan),
        *(["## Before healing", ""] if healed else []),
        *_quality(plan, matrices, losses, budget),
        *(["## Healed", "", *healed] if healed else []),
        *usage(source, row, plan.ranks, packed=bool(plan.grids)),
        *_made_by(command, report, factored=_factored(plan)),
    ]
    tags = ["svdconvert", *(("low-rank", "svd") if _factored(plan) else ())]
    return front_matter(source, [*tags, *(("compressed-tensors",) if plan.grids else ())]) + "\n".join(lines) + "\n"


def _overview(
    source: Source, plan: Plan, settings: Mapping[str, Any], matrices: Mapping[str, Mapping[str, Any]], title: str
) -> list[str]:
    """Title, and what the model is."""
    method = METHODS[plan.method]
    done = SOLVERS[settings["solver"]].done(list(matrices.values()))
    solver = "" if done is None else f" {settings['solver'].capitalize()} solver: {done}."
    text = f" Calibrated on {calibrated(method, settings)}." if "tokens" in settings else ""
    return [
        f"# {source.name.split('/')[-1]}{title}",
        "",
        f"[{source.name}]{_link(source)} with its linear layers {_done(plan)}, made by svdconvert.",
        "",
        f"Method `{plan.method}`: {method.summary}.{text} Layout `{plan.settings['layout']}`.{solver}",
        "",
        *_shared(plan.shared),
    ]


def _factored(plan: Plan) -> bool:
    """Whether the result is told of as one of low rank: not where all that was done is rounding."""
    return bool(plan.ranks) or not plan.grids


def _named(plan: Plan) -> str:
    """The same in a word, for the title."""
    if not plan.grids:
        return "factored"
    return "factored and rounded" if plan.ranks else "rounded"


def _done(plan: Plan) -> str:
    """What became of the linear layers."""
    if not plan.grids:
        return "replaced by products of low rank"
    return "rounded to few bits" + (", some as products of low rank" if plan.ranks else "")


def _sizes(plan: Plan) -> list[str]:
    """Tables of parameters and of ranks."""
    bits = bool(plan.grids)
    return [
        "| | parameters | bytes |",
        "|---|---|---|",
        f"| dense | {plan.params_before:,} | {plan.bytes_before:,} |",
        f"| this model | {plan.params_after:,} | {plan.bytes_after:,} |",
        "",
        f"| layers | shape | rank |{' bits |' if bits else ''} matrices | share kept |",
        f"|---|---|---|{'---|' if bits else ''}---|---|",
        *(
            f"| {g.name} | {g.shape[0]} x {g.shape[1]} | {g.rank} |{f' {g.width or 16} |' if bits else ''} {g.count} | "
            f"{g.params / g.dense_params:.1%} |"
            for g in plan.groups
        ),
        "",
        *([f"Bits of the weights: {widths_in_words(plan.targets)}.", ""] if bits else []),
    ]


def _quality(
    plan: Plan, matrices: Mapping[str, Mapping[str, Any]], losses: Mapping[str, float], budget: str
) -> list[str]:
    """What was lost, where anything was factored."""
    what = "Ranks and bits" if plan.settings.get("bytes") is not None else "Ranks"
    chosen = [f"{what} chosen by measuring: {budget}.", ""] if budget else []
    if not matrices:
        return [*_measured(losses), *chosen]
    train = "heal it or train an adapter beside it" if plan.grids else "fine-tune"
    advice = f"Truncation costs quality; measure it, and {train} before use."
    return [
        *_losses(matrices, rough_guess(worths=any("worth" in matrix for matrix in matrices.values()))),
        "",
        *_measured(losses),
        *chosen,
        advice,
        "",
    ]


_UNPACKING = (
    "The weights are packed as compressed-tensors stores them (`pack-quantized`), which transformers unpacks with the "
    f"package of that name. Versions before {NEEDED} read 3, 5, 6 and 7 bits wrongly, and transformers does not "
    "refuse them.",
    "",
    "```",
    f'pip install "compressed-tensors>={NEEDED}"',
    "```",
    "",
)


def usage(source: Source, row: Architecture, ranks: Mapping[str, int], *, packed: bool = False) -> list[str]:
    """How a result is loaded and fine-tuned.

    Args:
        source: what it was made from.
        row: its architecture.
        ranks: module path -> rank.
        packed: whether weights are stored in few bits.
    """
    auto = "AutoModelForCausalLM" if source.whole is None else "AutoModelForImageTextToText"
    merged = ", which unpacks the weights" if packed else ""
    return [
        "## Use",
        "",
        *(_UNPACKING if packed else ()),
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        'path = "THIS_REPOSITORY"',
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        f"model = {auto}.from_pretrained(path, trust_remote_code=True)",
        f'inputs = tokenizer("{_greeting(source)}", return_tensors="pt", return_token_type_ids=False)',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
        "```",
        "",
        _beside(bool(ranks), packed),
        "",
        "```python",
        f"target_modules = {_target_modules(source, ranks, row)}",
        "```",
        "",
        f"To merge such an adapter use `svdconvert fold`{merged}; `svdconvert densify` gives a stock "
        f"{(row if source.whole is None else source.whole.tower).dense_class} for engines without remote code.",
        "",
    ]


def _beside(factored: bool, packed: bool) -> str:
    """Where an adapter is."""
    if not factored and packed:
        return "LoRA (peft) trains beside each rounded weight Q, which stays as it is, h = Q x + scale * LB(LA x), with"
    return "LoRA (peft) runs in parallel to each whole product, h = B(A x) + scale * LB(LA x), with"


def _made_by(command: str, report: bool, *, factored: bool) -> list[str]:
    """How the model can be made again."""
    return [
        "## Made by",
        "",
        "```",
        command,
        "```",
        "",
        f"`svdconvert.json` holds versions, settings, and the {'rank' if factored else 'bits'} and errors of every "
        "matrix." + (f" [`{REPORT}`]({REPORT}) shows them: download it and open it in a browser." if report else ""),
    ]


def _target_modules(source: Source, ranks: Mapping[str, int], row: Architecture) -> str:
    """What peft takes; of a model that sees, a pattern, since what it sees with has layers of the same names."""
    names = _adaptable(ranks, row)
    return repr(names) if source.whole is None else f"r'.*language_model.*\\.({'|'.join(names)})'"


def _adaptable(ranks: Mapping[str, int], row: Architecture) -> list[str]:
    """Names of the linear layers in a block of the result."""
    split = {suffix(layer) for layer in split_layers(row, ranks)}
    names = [own for target in row.targets for own in (row.fused[target].names if target in split else (target,))]
    return list(dict.fromkeys(name.split(".")[-1] for name in names))


def _shared(owners: Mapping[str, str]) -> list[str]:
    """What has to be known of factors that several layers use.

    Args:
        owners: module path -> that of the layer whose input-side factor it uses.
    """
    if not owners:
        return []
    told = (
        "The input-side factor `down` of some layers is that of an earlier one (`svd_shared` in config.json); it is "
        "stored and counted once. "
    )
    if all(layer_number(module) == layer_number(owner) for module, owner in owners.items()):
        told += "They are experts of one block: with FSDP, shard a block or more as a unit, not an expert."
    else:
        told += (
            "All layers of a group have to be in one stage of a pipeline; with FSDP, shard each `down` as a unit of "
            "its own, or the whole model as one."
        )
    return [told, ""]


def _losses(matrices: Mapping[str, Mapping[str, Any]], guess: str) -> list[str]:
    """A table of what each kind of layer has lost, and what its columns are."""
    columns = [column for column in _LOSSES if all(column[0] in report for report in matrices.values())]
    by_kind: dict[str, list[Mapping[str, Any]]] = {}
    for module, report in matrices.items():
        by_kind.setdefault(kind(module), []).append(report)
    lines = ["| lost, lowest / median / highest | " + " | ".join(heading for _, heading, _, _ in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for name, same in by_kind.items():
        cells = []
        for field, _, form, _ in columns:
            values = [float(report[field]) for report in same]
            cells.append(" / ".join(format(value, form) for value in (min(values), median(values), max(values))))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    legend = [f"{text}, {guess}" if field == "predicted_loss" else text for field, _, _, text in columns]
    return [*lines, "", "; ".join(legend) + "."]


def _measured(losses: Mapping[str, float]) -> list[str]:
    """The loss of the whole model, if it was measured."""
    if "measured_loss" not in losses:
        return []
    predicted = f" ({losses['predicted_loss']:+.4f} predicted)" if "predicted_loss" in losses else ""
    return [
        f"Loss on the calibration text, nats per token: {losses['dense_loss']:.4f} before, "
        f"{losses['measured_loss']:+.4f} by this conversion{predicted}. It was fitted to "
        "this text, so that others may lose more.",
        "",
    ]


def plain_card(source: Source, title: str, text: str, command: str, tags: Sequence[str]) -> str:
    """Card of a result that needs little explanation (densified, folded)."""
    body = f"# {title}\n\n{text}\n\n```\n{command}\n```\n"
    return front_matter(source, ["svdconvert", *tags]) + body


def _greeting(source: Source) -> str:
    """A prompt in the model's language, as far as its card names one."""
    return "안녕하세요" if "ko" in str(_source_metadata(source).get("language")) else "Hello"


def _link(source: Source) -> str:
    return f"(https://huggingface.co/{source.repo})" if source.repo else ""


def front_matter(source: Source, tags: Sequence[str]) -> str:
    """YAML metadata: licence and language are the source's."""
    from huggingface_hub import ModelCardData

    theirs = _source_metadata(source)
    kept: dict[str, Any] = {
        key: theirs[key] for key in ("license", "license_name", "license_link", "language", "datasets") if key in theirs
    }
    data = ModelCardData(
        # The Hub links a base model by repository id; a local folder has none unless its own card names one.
        base_model=source.repo or theirs.get("base_model"),
        library_name="transformers",
        pipeline_tag="text-generation" if source.whole is None else "image-text-to-text",
        tags=list(dict.fromkeys([*(theirs.get("tags") or []), *tags])),
        **kept,
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _source_metadata(source: Source) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    text = (source.card() or "").removeprefix("\ufeff")
    if not text:
        return {}
    try:
        return dict(ModelCard(text, ignore_metadata_errors=True).data.to_dict())
    except Exception:  # noqa: BLE001 - a card is free text; one that cannot be parsed has nothing to tell
        return {}

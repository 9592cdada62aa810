"""The architecture table: one row per supported family, each in a file of its own.

Adding a family is adding its file here and rendering that in ``modeling/``; ``docs/families.md`` has it step by step.
"""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.errors import InputError
from svdconvert.families import (
    apertus,
    arcee,
    bloom,
    cohere,
    cohere2,
    ernie4_5,
    exaone4,
    falcon,
    falcon_h1,
    gemma,
    gemma2,
    gemma3_text,
    glm,
    glm4,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granitemoehybrid,
    helium,
    hunyuan_v1_dense,
    hyperclovax,
    lfm2,
    llama,
    ministral,
    ministral3,
    mistral,
    mixtral,
    mpt,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen3,
    qwen3_5_text,
    qwen3_moe,
    qwen3_next,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
)
from svdconvert.families.claims import check_claims
from svdconvert.families.row import Architecture, Config, Shapes
from svdconvert.families.towers import TOWERS
from svdconvert.families.unsupported import kind_of, quantisation_of

__all__ = [
    "ARCHITECTURES",
    "FACTORED",
    "GPT_NEOX",
    "LONGEST",
    "Architecture",
    "dense_architecture",
    "dense_shapes",
    "factored_architecture",
    "longest_input",
]

# The files of the families, in the order of the table in docs/families.md.
_FILES = (
    gpt_neox,
    llama,
    mistral,
    ministral,
    ministral3,
    qwen2,
    qwen3,
    gemma,
    gemma2,
    gemma3_text,
    phi,
    phi3,
    granite,
    smollm3,
    exaone4,
    hyperclovax,
    olmo,
    olmo2,
    olmo3,
    cohere,
    cohere2,
    glm,
    glm4,
    seed_oss,
    ernie4_5,
    hunyuan_v1_dense,
    helium,
    apertus,
    arcee,
    nemotron,
    stablelm,
    starcoder2,
    qwen3_moe,
    mixtral,
    olmoe,
    gpt_oss,
    qwen3_next,
    qwen3_5_text,
    lfm2,
    granitemoehybrid,
    falcon_h1,
    opt,
    gpt2,
    gpt_bigcode,
    gptj,
    gpt_neo,
    bloom,
    falcon,
    mpt,
)

ARCHITECTURES: Mapping[str, Architecture] = {file.ROW.model_type: file.ROW for file in _FILES}
FACTORED: Mapping[str, Architecture] = {row.svd_model_type: row for row in ARCHITECTURES.values()}

GPT_NEOX = gpt_neox.ROW


def dense_architecture(config: Config, where: str) -> Architecture:
    """The row of a dense source checkpoint.

    Raises:
        InputError: the architecture is unknown, the checkpoint is already factored or quantised, or a field of its
            config is what it cannot be.
    """
    model_type = _model_type(config, where)
    if model_type in FACTORED or "svd_ranks" in config:
        raise InputError(
            f"{where} is already factored; give its dense source, or run `svdconvert densify {where} --out DIR` first"
        )
    method = quantisation_of(config)
    if method is not None and method not in multiplied_out(config):
        raise InputError(
            f"{where} is already quantised ({method}); convert the unquantised model and quantise the result"
        )
    if model_type is None or model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        seeing = ", ".join(sorted({tower.model_type for tower in TOWERS}))
        raise InputError(
            f"{where} has model_type {model_type!r}{kind_of(config)}, which is not supported; "
            f"give a decoder-only language model of one of the types {known}, or a model that sees of one of the types "
            f"{seeing}"
        )
    row = ARCHITECTURES[model_type]
    check_claims(config, row, where)
    if refused := row.refused(config):
        raise InputError(f"{where} has model_type {model_type!r} {refused}")
    return row


def dense_shapes(row: Architecture, config: Config, where: str) -> Shapes:
    """Every parameter that a dense checkpoint must have, and its shape as stored.

    Raises:
        InputError: config.json does not say it.
    """
    check_claims(config, row, where)
    try:
        shapes = row.parameters(config)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise InputError(f"config.json of {where} lacks {error}, so the model's shape is unknown; add it") from None
    for name, shape in shapes.items():
        if not all(shape):
            raise InputError(f"config.json of {where} gives {name} the shape {list(shape)}; correct its sizes")
    return shapes


def multiplied_out(config: Config) -> tuple[str, ...]:
    """The ways of quantisation in which a model of this type is read all the same."""
    row = ARCHITECTURES.get(str(config.get("model_type")))
    return row.experts.multiplied_out if row is not None and row.experts is not None else ()


def _model_type(config: Config, where: str) -> str | None:
    model_type = config.get("model_type")
    if model_type is not None and not isinstance(model_type, str):
        raise InputError(f"config.json of {where} says model_type {model_type!r}, but it must be a name; correct it")
    return model_type


def factored_architecture(config: Config, where: str) -> Architecture:
    """The row of a factored checkpoint.

    Raises:
        InputError: the checkpoint is not one that svdconvert wrote.
    """
    row = FACTORED.get(str(config.get("model_type")))
    if row is None or not isinstance(config.get("svd_ranks"), dict):
        raise InputError(
            f"{where} is not a factored checkpoint (model_type {config.get('model_type')!r}); "
            "give one that a conversion, `svdconvert heal` or `svdconvert fold` wrote"
        )
    check_claims(config, row, where)
    return row


# Fields of a config that say how many tokens the model reads; each family has one of them, or none.
LONGEST = ("max_position_embeddings", "n_positions", "max_seq_len")


def longest_input(config: Config, default: int) -> int:
    """Tokens that a model reads at most.

    Raises:
        InputError: its config does not say it with a number.
    """
    name, longest = next(((name, length) for name in LONGEST if (length := config.get(name))), ("", default))
    if type(longest) is not int or longest < 1:
        raise InputError(f"config.json says {name} {longest!r}, but it must be a number above 0; correct it")
    return longest

"""The architecture table: one row per supported family, in a file of its own or with its relatives.

Adding a family is adding a row and rendering its file in ``modeling/``; ``docs/families.md`` has it step by step.
"""

from __future__ import annotations

from collections.abc import Mapping

from svdconvert.architectures import gpt2, gpt_neox, llama, opt
from svdconvert.architectures.row import Architecture, Config
from svdconvert.errors import InputError

__all__ = [
    "ARCHITECTURES",
    "FACTORED",
    "GPT_NEOX",
    "Architecture",
    "dense_architecture",
    "factored_architecture",
    "longest_input",
]

ARCHITECTURES: Mapping[str, Architecture] = {
    row.model_type: row for row in (gpt_neox.ROW, *llama.ROWS, opt.ROW, gpt2.ROW)
}
FACTORED: Mapping[str, Architecture] = {row.svd_model_type: row for row in ARCHITECTURES.values()}

GPT_NEOX = gpt_neox.ROW

# What config.json has in models of other kinds, and what they are called.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
_SENSES = ("vision_config", "audio_config", "mm_vision_tower", "visual", "vision_tower")


def dense_architecture(config: Config, where: str) -> Architecture:
    """The row of a dense source checkpoint.

    Raises:
        InputError: the architecture is unknown, or the checkpoint is already factored or quantised.
    """
    model_type = config.get("model_type")
    if model_type in FACTORED or "svd_ranks" in config:
        raise InputError(
            f"{where} is already factored; give its dense source, or run `svdconvert densify {where} --out DIR` first"
        )
    quantised = config.get("quantization_config") or config.get("compression_config")
    if quantised:
        method = dict(quantised).get("quant_method", "an unknown method")
        raise InputError(
            f"{where} is already quantised ({method}); convert the unquantised model and quantise the result"
        )
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(
            f"{where} has model_type {model_type!r}{_kind(config)}, which is not supported; supported are decoder-only "
            f"language models of the types {known}"
        )
    return ARCHITECTURES[str(model_type)]


def _kind(config: Config) -> str:
    """What a model of an unknown type is, as far as its config tells."""
    inner = config.get("text_config")
    fields = {**(inner if isinstance(inner, Mapping) else {}), **config}
    if any(field in config for field in _SENSES):
        return ", a model that sees or hears"
    if config.get("is_encoder_decoder"):
        return ", an encoder with a decoder"
    if any((fields.get(field) or 0) not in (0, 1) for field in _EXPERTS):
        return ", a mixture of experts"
    return ""


def factored_architecture(config: Config, where: str) -> Architecture:
    """The row of a factored checkpoint.

    Raises:
        InputError: the checkpoint is not one that svdconvert wrote.
    """
    row = FACTORED.get(str(config.get("model_type")))
    if row is None or not isinstance(config.get("svd_ranks"), dict):
        raise InputError(
            f"{where} is not a factored checkpoint (model_type {config.get('model_type')!r}); "
            "give a folder that `svdconvert` wrote"
        )
    return row


def longest_input(config: Config, default: int) -> int:
    """Tokens that a model reads at most."""
    return int(config.get("max_position_embeddings") or config.get("n_positions") or default)

"""Models without weights: the class that loads a checkpoint, dense or factored, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from svdconvert.families.table import Architecture
from svdconvert.foreign import CORRECT, foreign_code, quiet_transformers
from svdconvert.models.loading import factored_classes, portable, stock_model
from svdconvert.storage.packed_config import unpacked_config
from svdconvert.storage.source import Source


def is_factored(source: Source) -> bool:
    """Whether a checkpoint has factors in the place of weights."""
    return "svd_ranks" in source.config


def skeleton(source: Source, row: Architecture) -> Any:
    """The causal model in evaluation mode: its parameters on the meta device, its buffers real.

    Buffers that are computed rather than stored (rotary frequencies, causal masks) have no values on the meta device
    and come out uninitialised from ``to_empty``, so only parameters are left out. The attention is the default of
    transformers: the one that config.json asks for may be for another machine.

    Args:
        source: the checkpoint; only its config is read.
        row: its architecture.

    Raises:
        InputError: no model can be made of its config.
    """
    from accelerate import init_empty_weights

    build = _factored if is_factored(source) else stock_model
    problem = f"config.json of {source.where} cannot be used"
    with foreign_code(problem, CORRECT), quiet_transformers(), init_empty_weights(include_buffers=False):
        return build(row, portable(unpacked_config(source.config))).eval()


def _factored(row: Architecture, config: Mapping[str, Any]) -> Any:
    config_class, model_class = factored_classes(row)
    return model_class(config_class(**config))


def check_stock(config: Mapping[str, Any], where: str) -> None:
    """Check that the stock class accepts a config as it will be written, with settings in both spellings.

    Raises:
        InputError: it does not.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in portable(config).items() if key != "model_type"}
    problem = f"config.json of {where} cannot be used"
    with foreign_code(problem, CORRECT), quiet_transformers(), init_empty_weights(include_buffers=False):
        made = AutoConfig.for_model(config["model_type"], **settings)
        AutoModelForCausalLM.from_config(made, trust_remote_code=False)


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Put the buffers of a module on a device."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            assert not buffer.is_meta, name
            part._buffers[name] = buffer.to(device)

"""Tiny models, run on the same tokens: what the tests of the families have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
)

from support.families import (
    VERSION,
    VOCAB,
)
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.models.probe import logits_by_block
from svdconvert.storage.source import LocalSource

DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"
IDS = torch.randint(4, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
# Rows of 17, 11 and 4 tokens, padded on the right: what calibration and classification see.
MASK = torch.arange(17)[None, :] < torch.tensor([17, 11, 4])[:, None]
TOKENS = CalibrationTokens(IDS.masked_fill(~MASK, 3), MASK, 3, int(MASK.sum()))


def load(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **options)
    assert not info["missing_keys"]
    return model.eval()


def logits(model: Any, ids: Tensor = IDS, mask: Tensor | None = None, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, **options).logits.float()


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def by_block(folder: Path, ids: Tensor = IDS) -> Tensor:
    return torch.cat(list(logits_by_block(LocalSource(folder), ids)), -1)

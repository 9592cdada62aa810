"""Ablation of singular values against full SVDs on the model in memory."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support.checkpoints import TARGETS, read_config
from transformers import GPTNeoXForCausalLM

from svdconvert import InputError, ablate, evaluate
from svdconvert.commands.evaluate import negative_log_likelihood
from svdconvert.models.passages import read_passage

TEXT = "옛날 옛적에 호랑이가 살았다. Once upon a time there was a tiger.\n" * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_against_full_svds(dense: Path, text: Path) -> None:
    found = ablate(dense, text, groups=5, window=48, device="cpu")
    assert [row.group for row in found] == [0, 1, 2, 3, 4, 5]
    assert found[0].perplexity == pytest.approx(evaluate(dense, text, window=48, device="cpu").perplexity)
    assert sum(row.energy for row in found[1:]) == pytest.approx(1)
    passage = read_passage(dense, read_config(dense), text, 48, None)
    for row in found[1:]:
        model = GPTNeoXForCausalLM.from_pretrained(dense).float().eval()
        removed = whole = 0.0
        with torch.no_grad():
            for name in TARGETS:
                weight = model.get_parameter(f"gpt_neox.{name}.weight")
                u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
                part = slice(len(s) * (row.group - 1) // 5, len(s) * row.group // 5)
                removed, whole = removed + float(s[part].square().sum()), whole + float(s.square().sum())
                weight -= ((u[:, part] * s[part]) @ v[part]).float()
        expected = math.exp(negative_log_likelihood(model, passage, 8) / passage.tokens)
        assert row.perplexity == pytest.approx(expected, rel=1e-3)
        assert row.energy == pytest.approx(removed / whole, rel=1e-4)
    assert len({round(row.perplexity, 6) for row in found}) == 6


def test_targets(dense: Path, text: Path) -> None:
    """One matrix, one group: nothing of it is left."""
    only = ablate(dense, text, groups=1, targets="layers.1.attention.dense", window=48, device="cpu")[1]
    model = GPTNeoXForCausalLM.from_pretrained(dense).float().eval()
    model.get_parameter("gpt_neox.layers.1.attention.dense.weight").data.zero_()
    passage = read_passage(dense, read_config(dense), text, 48, None)
    expected = math.exp(negative_log_likelihood(model, passage, 8) / passage.tokens)
    assert only.perplexity == pytest.approx(expected, rel=1e-4)
    assert only.energy == pytest.approx(1)


@pytest.mark.parametrize("groups", [0, -1, 65])
def test_impossible_groups(groups: int, dense: Path, text: Path) -> None:
    with pytest.raises(InputError, match="64 singular values"):
        ablate(dense, text, groups=groups, device="cpu")

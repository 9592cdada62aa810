"""Every family, loaded as a base model, a causal model or a classifier; what is not whole is refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import read_config
from support.families import (
    rewrite_config,
)
from support.family_contract import LikeStock
from support.pairs import Pair
from support.representatives import EACH_ONCE, FEW
from support.running import IDS, distance, load, logits
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
)

from svdconvert.families.row import Architecture


@EACH_ONCE
class TestFactored(LikeStock):
    """On whole matrices."""


@EACH_ONCE
def test_token_classification(row: Architecture, pair: Pair, tmp_path: Path) -> None:
    from_pretrained = AutoModelForTokenClassification.from_pretrained
    if not row.labels:
        assert not hasattr(transformers, f"{row.inner}ForTokenClassification")
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            from_pretrained(pair.factored, trust_remote_code=True)
        return
    stock = from_pretrained(pair.densified, num_labels=4).eval()
    model, info = from_pretrained(pair.factored, num_labels=4, trust_remote_code=True, output_loading_info=True)
    assert set(info["missing_keys"]) == {f"{row.labels}.weight", f"{row.labels}.bias"}
    head = stock.get_submodule(row.labels if hasattr(stock, row.labels) else "classifier")  # Phi-3's in transformers 4
    model.eval().get_submodule(row.labels).load_state_dict(head.state_dict())
    expected = logits(stock)
    assert expected.shape == (*IDS.shape, 4)
    assert distance(logits(model), expected) < 1e-4
    model.save_pretrained(tmp_path)
    assert distance(logits(load(tmp_path, AutoModelForTokenClassification)), expected) < 1e-4


def test_without_trust_remote_code_it_does_not_load(row: Architecture, checkpoints: Any) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(checkpoints.pair(row.model_type).factored, trust_remote_code=False)


@FEW
@pytest.mark.parametrize("change", ["absent", "unnamed", "rank"])
def test_unsound_checkpoints_do_not_load(row: Architecture, checkpoints: Any, change: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(checkpoints.pair(row.model_type).factored, tmp_path / "torn"))
    ranks = read_config(folder)["svd_ranks"]
    first = next(iter(ranks))
    if change == "absent":
        dense = next(name for name in ("self_attn.o_proj", "mlp.c_proj") if name)
        module = re.sub(r"^(.*?\.\d+\.).*$", rf"\1{dense}", first)
        ranks |= {module: 8}
    elif change == "unnamed":
        del ranks[first]
    else:
        ranks[first] += 1
    rewrite_config(folder, svd_ranks=ranks)
    with pytest.raises((ValueError, RuntimeError)):
        load(folder)


@FEW
def test_a_tied_head_is_never_left_without_its_weight(row: Architecture, checkpoints: Any) -> None:
    """Transformers 5.3.0 does so for code that is not its own, and computes with memory that nobody filled."""
    model = load(checkpoints.pair(row.model_type).factored)
    if not model.config.tie_word_embeddings:
        return
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.to("meta"))
    importlib.import_module(type(model).__module__)._tie_head(model)
    assert head.weight is model.get_input_embeddings().weight


@FEW
def test_a_rule_for_a_tied_embedding_is_kept(row: Architecture, checkpoints: Any) -> None:
    """Transformers 5.15 to 5.22 ask a config for its tensor-parallel plan while it is made, and add a rule."""
    config = AutoConfig.from_pretrained(checkpoints.pair(row.model_type).factored, trust_remote_code=True)
    plan = dict(config.base_model_tp_plan or {})
    made = type(config).__new__(type(config))
    assert not any(rule.endswith(".down") for rule in made.base_model_tp_plan or {})
    config.base_model_tp_plan = {**plan, "embed_tokens": "embedding_rowwise"}
    assert config.base_model_tp_plan == {**plan, "embed_tokens": "embedding_rowwise"}
    assert "_tied_rule" not in config.to_dict()

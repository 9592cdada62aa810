"""Every family, loaded as a base model, a causal model or a classifier; what is not whole is refused."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import read_config
from support.families import (
    VERSION,
    rewrite_config,
)
from support.running import IDS, MASK, distance, load, logits
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from svdconvert.families.row import Architecture


def test_base_model(row: Architecture, pair: SimpleNamespace) -> None:
    stock = AutoModel.from_pretrained(pair.densified).eval()
    model = load(pair.factored, AutoModel)
    assert type(model).__name__ == f"{row.factored}Model"
    with torch.no_grad():
        hidden = model(IDS).last_hidden_state
        assert distance(hidden, stock(IDS).last_hidden_state) < 1e-4


def test_generation(row: Architecture, pair: SimpleNamespace) -> None:
    """With a cache, from a batch padded on the left, as the stock model of the same weights."""
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    mask = MASK.flip(1).long()
    stock, model = AutoModelForCausalLM.from_pretrained(pair.densified).eval(), load(pair.factored)
    with torch.no_grad():
        expected = stock.generate(IDS, attention_mask=mask, **options)
        assert torch.equal(model.generate(IDS, attention_mask=mask, **options), expected)
        # one row, not padded, token by token without a cache
        ids = IDS[:1]
        cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert torch.equal(cached, stock.generate(ids, attention_mask=torch.ones_like(ids), **options))
        if VERSION < (4, 57) and row.model_type == "gemma2":
            return  # its cache of those days forgets more than the window, in the stock model too
        for _ in range(8):
            ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
        assert torch.equal(cached, ids)


def test_sequence_classification(row: Architecture, pair: SimpleNamespace, tmp_path: Path) -> None:
    if not row.classifies:
        with pytest.raises(ValueError, match="Unrecognized configuration class"):
            AutoModelForSequenceClassification.from_pretrained(pair.factored, trust_remote_code=True)
        return
    from_pretrained = AutoModelForSequenceClassification.from_pretrained
    stock = from_pretrained(pair.densified, num_labels=4, pad_token_id=3).eval()
    model, info = from_pretrained(
        pair.factored, num_labels=4, pad_token_id=3, trust_remote_code=True, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    model.eval().score.load_state_dict(stock.score.state_dict())
    ids = IDS.masked_fill(~MASK, 3)
    expected = logits(stock, ids, MASK.long())
    assert expected.shape == (3, 4)
    assert distance(logits(model, ids, MASK.long()), expected) < 1e-4
    model.save_pretrained(tmp_path)
    again = load(tmp_path, AutoModelForSequenceClassification)
    assert distance(logits(again, ids, MASK.long()), expected) < 1e-4


def test_token_classification(row: Architecture, pair: SimpleNamespace, tmp_path: Path) -> None:
    from_pretrained = AutoModelForTokenClassification.from_pretrained
    if not row.labels:
        assert not hasattr(transformers, f"{row.stock}ForTokenClassification")
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


def test_without_trust_remote_code_it_does_not_load(pairs: Any) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModelForCausalLM.from_pretrained(pairs["balanced"].factored, trust_remote_code=False)


@pytest.mark.parametrize("change", ["absent", "unnamed", "rank"])
def test_unsound_checkpoints_do_not_load(pairs: Any, change: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(pairs["balanced"].factored, tmp_path / "torn"))
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

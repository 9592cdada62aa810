"""What a factored checkpoint of any family does as the stock model: load, generate, classify, be saved and served.

A test file that has the fixtures ``row`` and ``pair`` runs these by a class of its own below :class:`LikeStock`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from support.checkpoints import read_config, read_weights
from support.families import VERSION
from support.pairs import Pair
from support.representatives import REPRESENTATIVES
from support.running import IDS, MASK, by_block, distance, load, logits
from svdconvert.families.row import Architecture
from svdconvert.jobs.model_files import modeling_source


def assert_sound(folder: Path, row: Architecture, source: Path) -> None:
    """The folder is a checkpoint as the converter writes it, of the same numbers."""
    assert (folder / f"{row.modeling}.py").read_bytes() == modeling_source(row)
    config, before = read_config(folder), read_config(source)
    assert config["auto_map"] == row.auto_map
    for key in ("model_type", "svd_ranks", "svd_layout", "tie_word_embeddings"):
        assert config.get(key, True) == before[key]
    assert row.config_overrides(config) == row.config_overrides(before)
    assert {key: config.get(key) for key in row.config_overrides(before)} == row.config_overrides(before)
    saved, expected = read_weights(folder), read_weights(source)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], expected[name]) for name in saved)


def linears(module: nn.Module, prefix: str = "") -> list[str]:
    """What an engine replaces: every nn.Linear, without looking inside; anything else is searched."""
    found = []
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            found.append(prefix + name)
        else:
            found += linears(child, f"{prefix}{name}.")
    return found


class Served(nn.Module):
    """Stands for the linear layers of a serving engine, which have no weights before they are loaded."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty_like(linear.weight))
        self.bias = None if linear.bias is None else nn.Parameter(torch.empty_like(linear.bias))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class LikeStock:
    """Tests of a pair: a factored checkpoint and the same densified."""

    def test_logits_by_block(self, pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
        """One block and a part of the head in memory at a time, and of the table only rows that a token needs."""
        monkeypatch.setattr("svdconvert.models.blocks.HEAD_BYTES", 64 * 4 * 33)
        for folder, model in ((pair.factored, pair.model), (pair.densified, pair.stock)):
            for ids in (IDS, IDS.remainder(3)):  # below the padding token, too
                assert distance(by_block(folder, ids), logits(model, ids)) < 1e-5

    def test_base_model(self, row: Architecture, pair: Pair) -> None:
        model = load(pair.factored, AutoModel)
        assert type(model).__name__ == f"{row.factored}Model"
        with torch.no_grad():
            hidden = model(IDS).last_hidden_state
            assert distance(hidden, pair.stock.base_model(IDS).last_hidden_state) < 1e-4

    def test_generation(self, row: Architecture, pair: Pair) -> None:
        """With a cache, from a batch padded on the left, as the stock model of the same weights."""
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
        mask = MASK.flip(1).long()
        stock, model = pair.stock, pair.model
        with torch.no_grad():
            expected = stock.generate(IDS, attention_mask=mask, **options)
            assert torch.equal(model.generate(IDS, attention_mask=mask, **options), expected)
            # one row, not padded, token by token without a cache
            ids = IDS[:1]
            cached = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            assert torch.equal(cached, stock.generate(ids, attention_mask=torch.ones_like(ids), **options))
            if VERSION < (4, 57) and row.model_type == "gemma2":
                return  # its cache of those days forgets more than the window, in the stock model too
            for _ in range(5):
                ids = torch.cat([ids, logits(model, ids, use_cache=False)[:, -1:].argmax(-1)], 1)
            assert torch.equal(cached, ids)

    def test_sequence_classification(self, row: Architecture, pair: Pair, tmp_path: Path) -> None:
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

    def test_round_trip(self, row: Architecture, pair: Pair, tmp_path: Path) -> None:
        model = load(pair.factored)  # saving fits its config
        model.save_pretrained(tmp_path / "one")
        assert_sound(tmp_path / "one", row, pair.factored)
        again = load(tmp_path / "one")
        assert distance(logits(again), logits(model)) == 0
        if row.model_type in REPRESENTATIVES:
            again.save_pretrained(tmp_path / "two")
            assert_sound(tmp_path / "two", row, pair.factored)
            assert distance(logits(load(tmp_path / "two")), logits(model)) == 0

    def test_engine_that_replaces_every_linear_layer(self, row: Architecture, pair: Pair) -> None:
        """As vLLM and SGLang do: the base model is built on meta, its nn.Linear are replaced, then come the weights."""
        config = AutoConfig.from_pretrained(pair.factored, trust_remote_code=True)
        with torch.device("meta"):
            model = AutoModel.from_config(config, trust_remote_code=True)
        replaced = linears(model)
        for path in replaced:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Served(model.get_submodule(path)))
        factors = {f"{path}.{side}" for path in config.svd_ranks for side in ("down", "up")}
        assert factors <= set(replaced)
        assert not set(config.svd_ranks) & set(replaced)
        stock = pair.stock.base_model
        weights = {name.removeprefix(row.prefix): tensor for name, tensor in read_weights(pair.factored).items()}
        weights.pop("lm_head.weight", None)
        model.load_state_dict(weights, assign=True, strict=False)
        buffers = dict(stock.named_buffers())
        for name, _ in list(model.named_buffers()):
            if name not in weights:
                parent, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(parent), leaf, buffers[name].clone())
        for path, module in model.named_modules():  # tables of an older GPT-J that are no buffers
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    setattr(module, name, vars(stock.get_submodule(path))[name].clone())
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        with torch.no_grad():
            hidden = model.eval()(IDS, use_cache=False).last_hidden_state
            assert distance(hidden, stock(IDS, use_cache=False).last_hidden_state) < 1e-4

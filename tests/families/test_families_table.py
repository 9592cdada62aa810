"""The rows of the architecture table, against the stock classes and what is rendered of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from support.families import (
    VERSION,
    rewrite_config,
    stock_config,
    stock_model,
    write_family,
)
from support.naive_experts import with_naive_experts
from torch import nn
from transformers.pytorch_utils import Conv1D

from svdconvert.errors import InputError
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES, FACTORED
from svdconvert.families.towers import TOWERS
from svdconvert.jobs.model_files import modeling_source
from svdconvert.models import preflight
from svdconvert.models.head import LOGITS
from svdconvert.names import kind
from svdconvert.storage.source import LocalSource

ROOT = Path(__file__).parents[2]


def test_parameters_are_those_of_the_stock_model(row: Architecture) -> None:
    """And the buffers that are stored beside them."""
    model = with_naive_experts(stock_model(row.model_type), row)
    stored = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    shapes = {name: tuple(tensor.shape) for name, tensor in [*model.named_parameters(), *stored.items()]}
    if row.head[1] in shapes:  # GPT-NeoX saves it under its old name
        shapes[row.head[0]] = shapes.pop(row.head[1])
    assert row.parameters(model.config.to_dict()) == shapes
    untied = stock_config(row.model_type, tie_word_embeddings=False)
    assert row.head[0] in row.parameters(untied.to_dict())
    assert type(untied)().tie_word_embeddings == row.is_tied({})


def test_every_file_of_a_family_is_in_the_table() -> None:
    """And says what it has to, once: nothing is found under two names, or missing where transformers has it."""
    folder = ROOT / "svdconvert" / "families"
    assert {path.stem for path in folder.glob("*.py") if "\nROW = " in path.read_text()} == ARCHITECTURES.keys()
    assert len(FACTORED) == len({row.factored for row in ARCHITECTURES.values()}) == len(ARCHITECTURES)
    for row in ARCHITECTURES.values():
        assert hasattr(transformers, f"{row.inner}Config") == (row.since <= VERSION)
        assert row.models
        assert row.remarks
    assert {row.pieces.logits for row in ARCHITECTURES.values()} == LOGITS.keys()


def test_an_older_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers 4.57 has Gemma 3, but reads none of the rotary settings that 5 writes."""
    model = write_family(tmp_path / "model", "llama")
    rewrite_config(model, model_type="gemma3_text")
    monkeypatch.setattr(preflight, "transformers", SimpleNamespace(__version__="4.57.1"))
    with pytest.raises(InputError, match=r"'gemma3_text', which needs transformers 5\.0 or newer.* is 4\.57\.1"):
        preflight._check_version(LocalSource(model), "gemma3_text", ARCHITECTURES["gemma3_text"].since)


def test_what_is_rendered() -> None:
    """The modeling files and the table in the documentation are what the rows and templates give, byte for byte."""
    pytest.importorskip("jinja2")
    if importlib.util.find_spec("ruff") is None:
        pytest.skip("needs ruff")
    path = ROOT / "modeling" / "templates" / "render.py"
    spec = importlib.util.spec_from_file_location("render", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for row in FACTORED.values():
        assert modeling_source(row).decode() == module.render(row), f"{row.modeling}: run `make modeling`"
    for tower in TOWERS:
        rendered = module.render(tower.rendered, tower)
        assert modeling_source(tower).decode() == rendered, f"{tower.modeling}: run `make modeling`"
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "docs/families.md: run `make modeling`"


def test_targets_are_all_linear_layers_of_the_blocks(row: Architecture) -> None:
    base = with_naive_experts(stock_model(row.model_type), row).base_model
    found = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    inside = {name for name in found if re.search(r"\.\d+\.", name)}
    router = row.experts and f"{row.experts.mixture}.{row.experts.router}"
    inside = {name for name in inside if not (router and name.endswith(router))}  # transformers 4's, a linear layer
    assert {kind(name) for name in inside} == {*row.targets, *row.gates}
    if row.experts is None and not row.kinds:
        assert len(inside) == 3 * len(row.targets)

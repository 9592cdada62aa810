"""Every row of the architecture table, from conversion to serving, against the stock model of the same weights."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support.checkpoints import read_config, read_weights
from support.families import (
    FAMILIES,
    VERSION,
    VOCAB,
    full_ranks,
    rewrite_config,
    stock_config,
    stock_model,
    write_family,
)
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.pytorch_utils import Conv1D

from svdconvert import Calibration, calibrate, convert, densify, fold, plan, verify
from svdconvert.calibration.run import StatisticsRun
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.commands.verify import failed
from svdconvert.factoring.measured import measure_losses
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES, FACTORED
from svdconvert.jobs.model_files import modeling_source
from svdconvert.layouts.table import LAYOUTS
from svdconvert.methods.statistics import STATISTICS, Needs
from svdconvert.methods.table import METHODS
from svdconvert.models.head import LOGITS
from svdconvert.models.probe import logits_by_block
from svdconvert.names import layer_number, suffix
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource

ROOT = Path(__file__).parents[2]
DTYPE = "dtype" if VERSION >= (4, 56) else "torch_dtype"
IDS = torch.randint(4, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
# Rows of 17, 11 and 4 tokens, padded on the right: what calibration and classification see.
MASK = torch.arange(17)[None, :] < torch.tensor([17, 11, 4])[:, None]


@pytest.fixture(scope="session", params=FAMILIES)
def row(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


@pytest.fixture(scope="session")
def dense(row: Architecture, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stock model. Read only."""
    return write_family(tmp_path_factory.mktemp(row.model_type) / "dense", row.model_type)


@pytest.fixture(scope="session")
def pairs(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """By layout: a factored checkpoint with one kind of target left dense, and the same densified. Read only."""
    folder = tmp_path_factory.mktemp("pairs")
    kinds = [name for name in ARCHITECTURES[read_config(dense)["model_type"]].targets if "o_proj" not in name]
    made = {}
    for layout in LAYOUTS:
        factored, product = folder / f"{layout}-factored", folder / f"{layout}-densified"
        convert(dense, factored, keep=0.6, layout=layout, targets=kinds, device="cpu")
        densify(factored, product, device="cpu")
        made[layout] = SimpleNamespace(factored=factored, densified=product)
    return made


@pytest.fixture(scope="session", params=LAYOUTS)
def pair(request: pytest.FixtureRequest, pairs: dict[str, SimpleNamespace]) -> SimpleNamespace:
    return pairs[request.param]


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


# -- the table ---------------------------------------------------------------------------------------------------------


def test_parameters_are_those_of_the_stock_model(row: Architecture) -> None:
    model = stock_model(row.model_type)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
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
        assert hasattr(transformers, f"{row.stock}Config") == (row.since <= VERSION)
        assert row.models
        assert row.remarks
    assert {row.pieces.logits for row in ARCHITECTURES.values()} == LOGITS.keys()


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
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), "docs/families.md: run `make modeling`"


def test_targets_are_all_linear_layers_of_the_blocks(row: Architecture) -> None:
    base = stock_model(row.model_type).base_model
    found = {name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    inside = {name for name in found if re.search(r"\.\d+\.", name)}
    assert {re.sub(r"^.*?\.\d+\.", "", name) for name in inside} == set(row.targets)
    assert len(inside) == 3 * len(row.targets)


# -- conversion --------------------------------------------------------------------------------------------------------


def test_full_rank_equals_the_stock_model(row: Architecture, dense: Path, tmp_path: Path) -> None:
    ranks = full_ranks(row, dense)
    report = convert(dense, tmp_path / "out", rank=ranks, factor_all=True, device="cpu")
    assert max(report.errors) < 1e-5
    model, stock = load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(dense).eval()
    assert type(model).__name__ == row.causal_class
    assert set(model.config.svd_ranks) == set(ranks)
    assert distance(logits(model), logits(stock)) < 1e-4
    ours, theirs = logits(model, mask=MASK.long()), logits(stock, mask=MASK.long())
    assert distance(ours[MASK], theirs[MASK]) < 1e-4


def test_densified_equals_factored(row: Architecture, dense: Path, pair: SimpleNamespace) -> None:
    """The stock class takes the result whole, and the numbers do not change; rank 0.6 is a real change."""
    stock, info = AutoModelForCausalLM.from_pretrained(pair.densified, output_loading_info=True)
    assert not any(info.values())
    assert type(stock).__name__ == row.dense_class
    expected = logits(stock.eval())
    assert distance(logits(load(pair.factored)), expected) < 1e-4
    assert distance(logits(AutoModelForCausalLM.from_pretrained(dense).eval()), expected) > 0.05
    assert read_weights(pair.densified).keys() == read_weights(dense).keys()
    assert not list(pair.densified.glob("*.py"))
    # what llama.cpp's converter asks of config.json and of no other field
    config, asked = read_config(pair.densified), {"gpt_neox": "rotary_pct", "gpt2": "n_ctx", "phi3": "rope_parameters"}
    assert asked.get(row.model_type, "model_type") in config
    if row.model_type == "gpt2":
        assert config["n_ctx"] == config["n_positions"]


def test_verify(dense: Path, pair: SimpleNamespace) -> None:
    assert not failed(verify(pair.factored, str(dense)))


def test_logits_by_block(pair: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one block, and a part of the head, in memory at a time; rows of the table that no token needs are not."""
    monkeypatch.setattr("svdconvert.models.blocks.HEAD_BYTES", 64 * 4 * 33)
    for folder in (pair.factored, pair.densified):
        model = load(folder)
        for ids in (IDS, IDS.remainder(3)):  # below the padding token, too
            assert distance(by_block(folder, ids), logits(model, ids)) < 1e-5


def test_layers_that_share_a_factor(row: Architecture, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "shared", keep=0.6, share_layers=2, device="cpu")
    densify(tmp_path / "shared", tmp_path / "densified", device="cpu")
    model, stock = load(tmp_path / "shared"), load(tmp_path / "densified")
    assert len(model.config.svd_shared) == len(row.targets)
    assert distance(logits(model), logits(stock)) < 1e-4
    assert distance(logits(model), by_block(tmp_path / "shared")) < 1e-5
    assert not failed(verify(tmp_path / "shared", str(dense)))
    model.save_pretrained(tmp_path / "again")
    assert_sound(tmp_path / "again", row, tmp_path / "shared")
    assert distance(logits(load(tmp_path / "again")), logits(model)) == 0


def test_embedding_is_stored_once(row: Architecture, pair: SimpleNamespace) -> None:
    names = read_weights(pair.factored).keys()
    assert ("lm_head.weight" in names) != row.tied
    model = load(pair.factored)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == row.tied


def test_other_forms_of_the_source(row: Architecture, dense: Path, pairs: Any, tmp_path: Path) -> None:
    """Shards that cut through layers, names without the base model's prefix, and a tied head stored all the same."""
    source = write_family(tmp_path / "shards", row.model_type, max_shard_size="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    from safetensors.torch import save_file

    tensors = read_weights(dense)
    (bare := tmp_path / "bare").mkdir()
    stored = {name.removeprefix(row.prefix): tensor.clone() for name, tensor in tensors.items()}
    if row.tied:
        stored[row.head[0]] = next(tensor.clone() for name, tensor in tensors.items() if tensor.shape[0] == VOCAB)
    save_file(stored, bare / "model.safetensors", metadata={"format": "pt"})
    (bare / "config.json").write_bytes((dense / "config.json").read_bytes())
    kinds = [name for name in row.targets if "o_proj" not in name]
    expected = read_weights(pairs["balanced"].factored)
    for folder in (source, bare):
        report = convert(folder, tmp_path / "out", keep=0.6, targets=kinds, device="cpu", overwrite=True, check=False)
        found = read_weights(tmp_path / "out")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
        assert report.plan.params_before == sum(tensor.numel() for tensor in tensors.values())
    assert any("stored once" in note for note in report.plan.notes) == row.tied
    assert not failed(verify(tmp_path / "out", str(bare)))
    one, two = (
        measure_losses(
            LocalSource(folder),
            TOKENS,
            lambda index: {},
            work=tmp_path / "w",
            device="cpu",
            batch_size=3,
            events=Events(),
        )
        for folder in (dense, bare)
    )
    assert one == two


def test_plan_needs_the_config_only(row: Architecture, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    one, two = plan(dense, keep=0.5), plan(tmp_path, keep=0.5)
    assert (one.params_before, one.params_after, one.ranks) == (two.params_before, two.params_after, two.ranks)


# -- loading -----------------------------------------------------------------------------------------------------------


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


# -- saving, here and by the other end of the supported versions -------------------------------------------------------


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


def test_round_trip(row: Architecture, pair: SimpleNamespace, tmp_path: Path) -> None:
    model = load(pair.factored)
    model.save_pretrained(tmp_path / "one")
    assert_sound(tmp_path / "one", row, pair.factored)
    again = load(tmp_path / "one")
    again.save_pretrained(tmp_path / "two")
    assert_sound(tmp_path / "two", row, pair.factored)
    assert distance(logits(load(tmp_path / "two")), logits(model)) == 0


def test_rotary_spellings(row: Architecture, pairs: Any, tmp_path: Path) -> None:
    """Either spelling alone is understood; two that differ are refused."""
    import shutil

    both = row.config_overrides(read_config(pairs["balanced"].factored))
    if "rope_parameters" not in both:
        pytest.skip("no rotary positions")
    expected = logits(load(pairs["balanced"].factored))
    folder = Path(shutil.copytree(pairs["balanced"].factored, tmp_path / "spelled"))
    v4 = {key: None for key in both if key != "rope_parameters"}
    for missing in ({"rope_parameters": None}, v4):
        rewrite_config(folder, **(both | missing))
        assert distance(logits(load(folder)), expected) == 0
    name = "rotary_emb_base" if "rotary_emb_base" in both else "rope_theta"
    rewrite_config(folder, **(both | {name: 77.0}))
    with pytest.raises(ValueError, match=f"{name}=77.0, but"):
        load(folder)


def longrope(channels: int) -> dict[str, Any]:
    """Scaling of so many rotary channels."""
    short, long = ([scale + 0.1 * n for n in range(channels // 2)] for scale in (1.0, 2.0))
    return {"type": "longrope", "short_factor": short, "long_factor": long}


# Heads have 16 channels.
PHI3: dict[str, dict[str, Any]] = {
    "longrope": {"rope_scaling": longrope(16)},
    "partial": {"rope_scaling": None, "partial_rotary_factor": 0.75},
    "partial longrope": {"rope_scaling": longrope(12), "partial_rotary_factor": 0.75},
}


@pytest.mark.parametrize("spelling", ["saved", "published", "su"])
@pytest.mark.parametrize("kind", PHI3)
def test_rotary_settings_of_phi3(kind: str, spelling: str, tmp_path: Path) -> None:
    """Full rank against the stock model, on both sides of the length from which on the long factors count, and across.

    As this version of transformers saves the config, as the models were published ("partial longrope" is Phi-4 mini),
    and with the name that longrope had in the first ones.
    """
    if spelling == "su" and "longrope" not in kind:
        pytest.skip("no scaling")
    if kind == "partial longrope" and VERSION < (5,):
        pytest.skip("4.46 wants a factor for every channel")
    dense = write_family(tmp_path / "dense", "phi3", **PHI3[kind])
    row, ranks = ARCHITECTURES["phi3"], full_ranks(ARCHITECTURES["phi3"], dense)
    stock = AutoModelForCausalLM.from_pretrained(dense).eval()
    if spelling != "saved":
        fields: dict[str, Any] = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | PHI3[kind]
        if spelling == "su":
            fields["rope_scaling"] = fields["rope_scaling"] | {"type": "su"}
        rewrite_config(dense, rope_parameters=None, **fields)
    convert(dense, tmp_path / "made", rank=ranks, factor_all=True, device="cpu")
    model = load(tmp_path / "made")
    ids = torch.randint(4, VOCAB, (2, 40), generator=torch.Generator().manual_seed(2))
    for length in (20, 40):
        assert distance(logits(model, ids[:, :length]), logits(stock, ids[:, :length])) < 1e-4
    if "longrope" in kind:
        start = logits(model, ids[:, :20])
        assert distance(start, logits(model, ids)[:, :20]) > 0.01, "the long factors are not used"
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 3}
    prompt = {"input_ids": ids[:, :28], "attention_mask": torch.ones(2, 28, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(model.generate(**prompt, **options), stock.generate(**prompt, **options))
    tokens = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), 3, ids.numel())
    loss, _ = measure_losses(
        LocalSource(dense), tokens, lambda index: {}, work=tmp_path / "w", device="cpu", batch_size=2, events=Events()
    )
    expected = nn.functional.cross_entropy(logits(stock, ids)[:, :-1].transpose(1, 2), ids[:, 1:], reduction="sum")
    assert loss.nll == pytest.approx(float(expected), rel=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert_sound(tmp_path / "again", row, tmp_path / "made")
    densify(tmp_path / "made", tmp_path / "densified", device="cpu")
    product = AutoModelForCausalLM.from_pretrained(tmp_path / "densified").eval()
    assert distance(logits(product, ids), logits(stock, ids)) < 1e-4


ELSEWHERE = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM
for job in json.loads(sys.argv[1]):
    stock = AutoModelForCausalLM.from_pretrained(job["densified"]).eval()
    model, info = AutoModelForCausalLM.from_pretrained(job["here"], trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.load(job["ids"])
    with torch.no_grad():
        torch.save([m(ids).logits for m in (model.eval(), stock)], job["logits"])
    model.save_pretrained(job["there"])
"""
# Those that the newest and the oldest supported version have.
EVERYWHERE = [name for name in FAMILIES if ARCHITECTURES[name].since <= (4, 46)]


@pytest.fixture(scope="session")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, str]]], None]:
    """Runs ELSEWHERE on a list of checkpoints in the environment with the other transformers."""
    python = os.environ.get("SVDCONVERT_OTHER_PYTHON")
    if not python:
        pytest.skip("SVDCONVERT_OTHER_PYTHON: no interpreter of another environment")

    def call(jobs: list[dict[str, str]]) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
        environment["HF_MODULES_CACHE"] = str(tmp_path_factory.mktemp("modules"))
        done = subprocess.run(
            [python, "-c", ELSEWHERE, json.dumps(jobs)], env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]

    return call


def test_saved_here_loaded_there_and_back(elsewhere: Any, tmp_path: Path) -> None:
    """All families in one process over there: importing transformers is what takes time."""
    torch.save(IDS, tmp_path / "ids.pt")
    jobs, expected = [], {}
    families = {name: name for name in EVERYWHERE}
    families |= {f"{name}-split": name for name in families if ARCHITECTURES[name].fused}
    for name, family in families.items():
        folder = tmp_path / name
        options: dict[str, Any] = {"keep": 0.6, "split_fused": name != family, "device": "cpu", "check": False}
        convert(write_family(folder / "dense", family), folder / "made", **options)
        densify(folder / "made", folder / "densified", device="cpu", check=False)
        model = load(folder / "made")
        model.save_pretrained(folder / "here")
        expected[name] = logits(model)
        paths = {key: str(folder / key) for key in ("densified", "here", "there", "logits")}
        jobs.append(paths | {"ids": str(tmp_path / "ids.pt")})
    elsewhere(jobs)
    for name, before in expected.items():
        folder = tmp_path / name
        ours, stock = torch.load(folder / "logits")
        assert distance(ours, before) < 1e-4, name
        assert distance(stock, before) < 1e-4, name
        assert_sound(folder / "there", ARCHITECTURES[families[name]], folder / "made")
        versions = {read_config(folder / side)["transformers_version"] for side in ("here", "there")}
        assert len(versions) == 2
        assert distance(logits(load(folder / "there")), before) < 1e-4, name


# -- adapters and quantisation -----------------------------------------------------------------------------------------


def target_names(row: Architecture) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in row.targets})


def test_lora_runs_beside_the_product_and_folds(row: Architecture, pair: SimpleNamespace, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, lora_alpha=6, target_modules=target_names(row), task_type="CAUSAL_LM")
    model = get_peft_model(load(pair.factored), config).eval()
    wrapped = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    prefix = f"base_model.model.{row.prefix}"
    assert {name.removeprefix(prefix) for name in wrapped} >= set(read_config(pair.factored)["svd_ranks"])
    assert len(wrapped) == 3 * len(row.targets)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    fold(pair.factored, tmp_path / "adapter", tmp_path / "folded", device="cpu")
    assert distance(expected, logits(load(pair.factored))) > 0.05
    assert distance(logits(load(tmp_path / "folded")), expected) < 1e-4
    with pytest.raises(RuntimeError, match="svdconvert fold"):
        model.merge_and_unload()


@pytest.mark.skipif(VERSION < (4, 57), reason="no bitsandbytes with CPU kernels for this transformers")
def test_four_bit_loading(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """At ranks of 64: on CPUs with AVX512-BF16, bitsandbytes takes 4-bit layers with a multiple of 64 inputs only."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    ranks = {module: rank for module, rank in full_ranks(row, dense).items() if rank == 64}
    convert(dense, tmp_path, rank=ranks, factor_all=True, device="cpu", check=False)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    options: dict[str, Any] = {"quantization_config": settings, "device_map": "cpu", DTYPE: torch.float32}
    model = load(tmp_path, **options)
    kinds = {name.removeprefix(row.prefix): type(module).__name__ for name, module in model.named_modules()}
    for path in ranks:
        assert kinds[path] == "AdaptableSVDLinear"
        assert kinds[f"{path}.down"] == kinds[f"{path}.up"] == "Linear4bit"
    expected = logits(AutoModelForCausalLM.from_pretrained(dense).eval())
    error = float((logits(model) - expected).pow(2).mean().sqrt() / expected.std())
    assert 1e-4 < error < 0.8
    # not the same object: after inference, bitsandbytes on a CPU adds biases in place, which cannot be differentiated
    model = prepare_model_for_kbit_training(load(tmp_path, **options))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=target_names(row), task_type="CAUSAL_LM"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


# -- serving -----------------------------------------------------------------------------------------------------------


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


def test_engine_that_replaces_every_linear_layer(row: Architecture, pair: SimpleNamespace) -> None:
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
    stock = AutoModel.from_pretrained(pair.densified).eval()
    weights = {name.removeprefix(row.prefix): tensor for name, tensor in read_weights(pair.factored).items()}
    weights.pop("lm_head.weight", None)
    model.load_state_dict(weights, assign=True, strict=False)
    buffers = dict(stock.named_buffers())
    for name, _ in list(model.named_buffers()):
        if name not in weights:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, buffers[name].clone())
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    with torch.no_grad():
        hidden = model.eval()(IDS, use_cache=False).last_hidden_state
        assert distance(hidden, stock(IDS, use_cache=False).last_hidden_state) < 1e-4


def test_tensor_parallel_plan(row: Architecture, pair: SimpleNamespace) -> None:
    """Each rule of the stock plan goes on to `up` or `down`, by whether it splits outputs or inputs."""
    config = AutoConfig.from_pretrained(pair.factored, trust_remote_code=True)
    stock = getattr(stock_config(row.model_type), "base_model_tp_plan", None) or {}
    config.svd_ranks = {}
    if not stock and config.base_model_tp_plan:
        pytest.skip("a plan of our own where this version of transformers has none")
    blocks = {path.rpartition(".")[0] for path in stock}
    every = dict.fromkeys(full_ranks(row, pair.densified), 4)
    attention = {module: rank for module, rank in every.items() if ".mlp." not in module}
    first = dict(list(every.items())[:1])
    assert config.base_model_tp_plan == stock
    for ranks in (every, attention, first):
        config.svd_ranks = ranks
        plan = config.base_model_tp_plan
        # whole blocks alone, and none of which a part is factored in some layers only
        kept = {rule.removesuffix(".up").removesuffix(".down").rpartition(".")[0] for rule in plan}
        broken = {block for block in blocks if any(block[9:] in path for path in ranks)}
        unsharded = broken if config.svd_layout == "pivoted" or ranks is first else set()
        assert kept == blocks - unsharded
        for rule, style in plan.items():
            path, _, side = rule.rpartition(".")
            if side in ("up", "down"):
                assert any(module.endswith(path.partition("*")[2]) for module in ranks)
                assert side == ("up" if style.startswith("colwise") else "down")
                assert stock[path] == style
            else:
                assert stock[rule] == style
                assert not any(module.endswith(rule.partition("*")[2]) for module in ranks)
    assert "base_model_tp_plan" not in config.to_dict()


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from transformers import AutoModelForCausalLM
dist.init_process_group("gloo")
ids = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/made", trust_remote_code=True, tp_plan="auto").eval()
    with torch.no_grad():
        found = model(ids).logits
    plan = model.config.base_model_tp_plan
    ends = tuple(rule.partition("*")[2] + ".weight" for rule, style in plan.items() if style[:3] in ("col", "row"))
    for name, parameter in model.named_parameters():
        if name.endswith(ends):
            assert parameter.to_local().numel() * 2 == parameter.numel(), name
    if dist.get_rank() == 0:
        torch.save(found, folder + "/parallel.pt")
    dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(VERSION < (5,), reason="native tensor parallelism on CPU is measured for transformers 5")
def test_tensor_parallel(tmp_path: Path) -> None:
    """All families that have a plan in one run of two processes: with shared factors, and with projections in parts."""
    torch.save(IDS, tmp_path / "ids.pt")
    expected = {}
    fused = [name for name in FAMILIES if ARCHITECTURES[name].fused]
    for name, split in [*((name, False) for name in FAMILIES), *((name, True) for name in fused)]:
        folder = tmp_path / f"{name}{'-split' if split else ''}"
        options: dict[str, Any] = {"share_layers": 2 if name == "mistral" else 1, "split_fused": split}
        convert(write_family(folder / "dense", name), folder / "made", keep=0.6, device="cpu", **options)
        model = load(folder / "made")
        if model.config.base_model_tp_plan:
            expected[folder] = logits(model)
    # of GPT-2 and OPT there is no plan
    assert len(expected) == len(FAMILIES) - 2 + len(fused) - 1
    (tmp_path / "run.py").write_text(TWO_PROCESSES)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    command += [str(path) for path in (tmp_path / "run.py", tmp_path / "ids.pt", *expected)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for folder, alone in expected.items():
        assert distance(torch.load(folder / "parallel.pt"), alone) < 1e-4, folder.name


def test_engine_that_brings_its_own_attention(row: Architecture, pairs: Any) -> None:
    stock_class = type(AutoModel.from_config(stock_config(row.model_type)))
    if not getattr(stock_class, "_supports_attention_backend", False):
        pytest.skip("the stock model of this version has no exchangeable attention")
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        calls.append((module.layer_idx, options["engine"]))
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
        out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS["engine"] = attention
    try:
        config = AutoConfig.from_pretrained(pairs["balanced"].factored, trust_remote_code=True)
        config._attn_implementation = "engine"
        model = AutoModel.from_pretrained(pairs["balanced"].factored, config=config, trust_remote_code=True)
        with torch.no_grad():
            model(IDS, use_cache=False, engine="yes")
    finally:
        del ALL_ATTENTION_FUNCTIONS["engine"]
    assert calls == [(layer, "yes") for layer in range(3)]


# -- calibration -------------------------------------------------------------------------------------------------------

TOKENS = CalibrationTokens(IDS.masked_fill(~MASK, 3), MASK, 3, int(MASK.sum()))


def keep(seen: dict[str, tuple[Tensor, Tensor]], name: str, module: Any, args: tuple[Tensor], output: Tensor) -> None:
    output.retain_grad()
    seen[name] = args[0], output


def in_memory(row: Architecture, model: Any, paths: list[str]) -> tuple[dict[str, dict[str, Tensor]], float]:
    """All statistics by autograd through the whole model, one unpadded sequence at a time; and the loss."""
    sums: dict[str, dict[str, Tensor]] = {}
    nll = 0.0
    for ids, counted in zip(IDS, MASK.sum(dim=1).tolist(), strict=True):
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = [
            model.base_model.get_submodule(path).register_forward_hook(partial(keep, seen, path)) for path in paths
        ]
        own = ids[None, :counted]
        found = model(input_ids=own, attention_mask=torch.ones_like(own)).logits[0, :-1]
        loss = nn.functional.cross_entropy(found, own[0, 1:], reduction="sum")
        loss.backward()
        nll += float(loss.detach())
        for hook in hooks:
            hook.remove()
        for path, (x, y) in seen.items():
            weight = model.base_model.get_submodule(path).weight
            assert y.grad is not None
            x, g = x.detach().reshape(counted, -1), y.grad.reshape(counted, -1)
            here = {
                "input_gram": x.T @ x,
                "output_gram": g.T @ g,
                "input_abs": x.abs().sum(0),
                "fisher": weight.grad.square().sum(1 if row.transposed else 0),
            }
            into = sums.setdefault(path, {})
            for kind, value in here.items():
                into[kind] = into.get(kind, 0) + value
        model.zero_grad()
    counts = dict.fromkeys(STATISTICS, TOKENS.tokens) | {"fisher": 3}
    return {path: {kind: value / counts[kind] for kind, value in into.items()} for path, into in sums.items()}, nll


def test_streamed_statistics_equal_those_in_memory(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """Masks, positions, windows, soft caps, scaled embeddings: all that a block is called with must be right."""
    model = AutoModelForCausalLM.from_pretrained(dense).eval()
    paths = list(full_ranks(row, dense))
    expected, nll = in_memory(row, model, paths)
    for batch_size in (1, 3):
        run = StatisticsRun(
            LocalSource(dense),
            TOKENS,
            Needs(True, True, True, True),
            paths,
            work=tmp_path,
            batch_size=batch_size,
        )
        found = {path: entry for _, part in run for path, entry in part.items()}
        assert run.loss is not None
        assert run.loss.nll == pytest.approx(nll, rel=1e-5)
        for path, entry in expected.items():
            for kind, value in entry.items():
                error = float((getattr(found[path], kind) - value).norm() / value.norm())
                assert error < 1e-4, (path, kind, error)


def test_streamed_losses_with_and_without_replaced_weights(
    row: Architecture, pair: SimpleNamespace, dense: Path, tmp_path: Path
) -> None:
    """Blocks of the dense model with the products in the place of their matrices are the densified model."""
    products = read_weights(pair.densified)
    factored = read_config(pair.factored)["svd_ranks"]

    def weights(index: int) -> dict[str, Tensor]:
        found = {}
        for module in factored:
            if layer_number(module) == index:
                product = products[f"{row.prefix}{module}.weight"]
                found[suffix(module)] = product.T if row.transposed else product
        return found

    losses = measure_losses(
        LocalSource(dense), TOKENS, weights, work=tmp_path / "w", device="cpu", batch_size=3, events=Events()
    )
    for folder, loss in zip((dense, pair.densified), losses, strict=True):
        model, expected = AutoModelForCausalLM.from_pretrained(folder).eval(), 0.0
        for ids, counted in zip(IDS, MASK.sum(dim=1).tolist(), strict=True):
            found = logits(model, ids[None, :counted])[0, :-1]
            expected += float(nn.functional.cross_entropy(found, ids[1:counted], reduction="sum"))
        assert loss.nll == pytest.approx(expected, rel=1e-5)


def test_every_method_reaches_a_size(row: Architecture, dense: Path, tmp_path: Path) -> None:
    """From one calibration, whatever the size is asked for as."""
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th story begins with {n * 7} words and ends well." for n in range(40)))
    calibrate(
        dense, Calibration(str(text), samples=8, length=32), tmp_path / "stats", methods=list(METHODS), device="cpu"
    )
    size = plan(dense, keep=0.6).params_after
    found = []
    for method, rules in METHODS.items():
        stats = tmp_path / "stats" if rules.statistics else None
        report = convert(dense, tmp_path / method, params=size, method=method, stats=stats, device="cpu", check=False)
        tensors = read_weights(tmp_path / method)
        assert sum(tensor.numel() for tensor in tensors.values()) == report.plan.params_after <= size
        # what is left over does not buy one more rank everywhere
        assert size - report.plan.params_after < sum(sum(target.shape) for target in report.plan.targets)
        found.append(logits(load(tmp_path / method)))
    assert all(distance(one, other) > 0.01 for n, one in enumerate(found) for other in found[:n])


def test_calibrated_conversion_from_the_command_line(row: Architecture, dense: Path, run: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th story begins with {n * 7} words and ends well." for n in range(40)))
    options = (
        "--layout",
        "pivoted",
        "--calib",
        text,
        "--calib-samples",
        8,
        "--calib-length",
        32,
        "--refit",
        "sequential",
    )
    done = run(dense, "--keep", 0.6, *options, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    done = run("verify", tmp_path / "out", "--against", dense)
    assert done.code == 0, done.out + done.err
    done = run("evaluate", tmp_path / "out", "--text", text, "--window", 32)
    assert done.code == 0, done.err
    done = run("ablate", dense, "--text", text, "--groups", 2, "--window", 32)
    assert done.code == 0, done.err

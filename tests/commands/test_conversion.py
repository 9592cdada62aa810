"""The whole conversion against an in-memory reference, over every form that a checkpoint comes in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import LAYERS, TARGETS, random_tensors, read_config, read_weights, tree, write_checkpoint
from support.results import products
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXForCausalLM

from svdconvert import convert, plan

HEAD = {"embed_out.weight": "lm_head.weight"}


def reference(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The textbook form: whole model in memory, one full SVD a matrix, products in float64."""
    result = {}
    for name, tensor in tensors.items():
        module = name.removeprefix("gpt_neox.").removesuffix(".weight")
        if module in TARGETS:
            u, s, v = torch.linalg.svd(tensor.double(), full_matrices=False)
            result[name] = (u[:, :rank] * s[:rank]) @ v[:rank]
        else:
            result[name] = tensor
    return result


@pytest.fixture(scope="module")
def pivoted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` at rank 16 in the pivoted layout. Read only."""
    folder = tmp_path_factory.mktemp("pivoted") / "tiny-r16"
    convert(dense, folder, rank=16, layout="pivoted", device="cpu")
    return folder


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_streamed_equals_in_memory(layout: str, dense: Path, request: pytest.FixtureRequest) -> None:
    source = read_weights(dense)
    expected, found = reference(source, 16), products(request.getfixturevalue(layout))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        module = name.removeprefix("gpt_neox.").removesuffix(".weight")
        if module in TARGETS:
            # float16 factors against exact ones: the rounding is all that differs.
            assert float((found[name] - tensor).norm() / tensor.norm()) < 2e-3
        else:
            assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_reported_numbers(layout: str, dense: Path, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(layout)
    record = json.loads((folder / "svdconvert.json").read_text())
    source, found = read_weights(dense), products(folder)
    assert list(record["matrices"]) == TARGETS
    for module, matrix in record["matrices"].items():
        weight = source[f"gpt_neox.{module}.weight"].double()
        error = float((weight - found[f"gpt_neox.{module}.weight"]).norm() / weight.norm())
        optimum = float(torch.linalg.svdvals(weight)[16:].norm() / weight.norm())
        assert matrix["relative_error"] == pytest.approx(error, rel=1e-4)
        assert matrix["optimal_error"] == pytest.approx(optimum, rel=1e-5)
        assert matrix["energy_kept"] == pytest.approx(1 - error**2, rel=1e-4)
        assert matrix["rank"] == 16


def test_full_rank_gives_the_dense_logits(fresh: Callable[..., Path], tmp_path: Path) -> None:
    source = fresh(random_tensors(dtype=torch.float32), config={"torch_dtype": "float32"})
    convert(source, tmp_path / "out", rank=64, factor_all=True, device="cpu")
    ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = GPTNeoXForCausalLM.from_pretrained(source).eval()(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
        found = model(ids).logits
    assert len(model.config.svd_ranks) == len(TARGETS)
    assert float((found - expected).abs().max()) < 1e-4
    assert float(expected.std()) > 0.1  # not a comparison of nothings


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_loads_by_auto_classes(layout: str, request: pytest.FixtureRequest) -> None:
    factored = request.getfixturevalue(layout)
    model, info = AutoModelForCausalLM.from_pretrained(factored, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.num_parameters() == plan_after(factored)
    tokenizer = AutoTokenizer.from_pretrained(factored)
    inputs = tokenizer("hello", return_tensors="pt", return_token_type_ids=False)
    assert model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] == inputs["input_ids"].shape[1] + 4


def plan_after(folder: Path) -> int:
    after: int = json.loads((folder / "svdconvert.json").read_text())["params"]["after"]
    return after


@pytest.mark.parametrize(
    "form",
    [{"shards": 4}, {"shards": 7, "legacy": True}, {"pickled": True}, {"pickled": True, "shards": 3, "legacy": True}],
    ids=["shards", "shards with buffers", "pickle", "pickle shards"],
)
def test_every_form_of_source_gives_the_same_tensors(
    form: dict[str, Any], fresh: Callable[..., Path], factored: Path, tmp_path: Path
) -> None:
    convert(fresh(**form), tmp_path / "out", rank=16, device="cpu", check=False)
    expected, found = read_weights(factored), read_weights(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name in expected:
        assert torch.equal(expected[name], found[name]), name


@pytest.mark.parametrize("limit", ["20kB", "50kB", "100kB"])
def test_shards_of_the_result(limit: str, dense: Path, factored: Path, tmp_path: Path) -> None:
    report = convert(dense, tmp_path / "out", rank=16, device="cpu", max_shard_size=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(report.plan.shards) == len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            assert name in handle.keys()  # noqa: SIM118 - safe_open is no container
    expected, found = read_weights(factored), read_weights(tmp_path / "out")
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_deterministic(dense: Path, factored: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu")
    assert tree(tmp_path / "out") == tree(factored)


def test_pivoted_stores_less(dense: Path, factored: Path, pivoted: Path) -> None:
    """r (m + n - r) parameters instead of r (m + n), the same logits, and the densified models agree."""
    saved = len(TARGETS) * 16 * 16
    assert plan_after(factored) - plan_after(pivoted) == saved
    assert plan(dense, rank=16, layout="pivoted").params_after == plan_after(pivoted)
    ids = torch.randint(0, 160, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        one, two = (
            AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).float().eval()(ids).logits
            for path in (factored, pivoted)
        )
    assert float((one - two).abs().max()) < 0.02 * float(one.std())


def test_workers_change_nothing(dense: Path, factored: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu", workers=3)
    assert tree(tmp_path / "out") == tree(factored)


def test_a_plan_knows_what_a_worker_costs(dense: Path) -> None:
    made = plan(dense, rank=16)
    assert made.solving_bytes(1) < made.solving_bytes(2) < made.solving_bytes(3)
    assert made.peak_bytes(3) >= made.solving_bytes(3)
    assert made.solving_bytes(3) - made.solving_bytes(2) == made.to_json()["peak_memory_bytes_per_worker"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(dtype: str, dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu", dtype=dtype)
    source, tensors = read_weights(dense), read_weights(tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert torch.equal(tensors["lm_head.weight"], source["embed_out.weight"].to(getattr(torch, dtype)))
    assert read_config(tmp_path / "out")["torch_dtype"] == dtype


def test_mixed_types_are_kept(fresh: Callable[..., Path], tmp_path: Path) -> None:
    tensors = random_tensors()
    for name in tensors:
        if "layernorm" in name:
            tensors[name] = tensors[name].float()
    convert(fresh(tensors), tmp_path / "out", rank=16, device="cpu")
    found = read_weights(tmp_path / "out")
    for name, tensor in tensors.items():
        if "layernorm" in name:
            assert torch.equal(found[name], tensor)
    assert found["gpt_neox.layers.0.attention.dense.up.weight"].dtype == torch.float16


def test_ranks_by_pattern(dense: Path, tmp_path: Path) -> None:
    ranks = {"*": 16, "attention.dense": 8, "layers.0.*": 4}
    convert(dense, tmp_path / "out", rank=ranks, device="cpu")
    found = read_config(tmp_path / "out")["svd_ranks"]
    assert found["layers.0.attention.dense"] == 4
    assert found["layers.1.attention.dense"] == 8
    assert found["layers.2.mlp.dense_4h_to_h"] == 16


def test_dense_targets_are_copied(dense: Path, tmp_path: Path) -> None:
    report = convert(dense, tmp_path / "out", rank=40, device="cpu")
    source, found = read_weights(dense), read_weights(tmp_path / "out")
    for layer in range(LAYERS):
        for part in ("weight", "bias"):
            name = f"gpt_neox.layers.{layer}.attention.dense.{part}"
            assert torch.equal(found[name], source[name])
    assert "saves nothing" in " ".join(report.plan.notes)


def test_side_files(dense: Path, factored: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja", "LICENSE"):
        assert (factored / name).read_bytes() == (dense / name).read_bytes()
    assert not (factored / ".svdconvert").exists()
    names = {path.name for path in factored.iterdir()}
    assert "modeling_polyglot_svd.py" in names


def test_only_side_files_come_along(fresh: Callable[..., Path], tmp_path: Path) -> None:
    source = fresh()
    for name in ("optimizer.pt", "flax_model.msgpack", "model.gguf", "trainer_state.json", "evil.py", ".gitattributes"):
        (source / name).write_text("x")
    (source / "onnx").mkdir()
    (source / "vocab.txt").write_text("a vocabulary")
    convert(source, tmp_path / "out", rank=16, device="cpu", check=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "vocab.txt" in names
    assert not names & {"optimizer.pt", "model.gguf", "trainer_state.json", "evil.py", "onnx", ".gitattributes"}
    assert not names & {"flax_model.msgpack"}


def test_config(dense: Path, factored: Path) -> None:
    source, config = read_config(dense), read_config(factored)
    assert config["model_type"] == "polyglot_svd"
    assert config["architectures"] == ["PolyglotSVDForCausalLM"]
    heads = {"CausalLM", "SequenceClassification", "TokenClassification"}
    autos = {"AutoConfig", "AutoModel", *(f"AutoModelFor{head}" for head in heads)}
    assert set(config["auto_map"]) == autos
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.5, 10000)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}
    changed = {"architectures", "model_type", "_name_or_path"}
    assert {key: config.get(key) for key in source if key not in changed} == {
        key: value for key, value in source.items() if key not in changed
    }


def test_config_of_transformers_5(fresh: Callable[..., Path], tmp_path: Path) -> None:
    """A source whose rotary settings are spelled the new way only."""
    source = fresh()
    config = read_config(source)
    del config["rotary_pct"], config["rotary_emb_base"], config["torch_dtype"]
    rope = {"rope_type": "default", "rope_theta": 500, "partial_rotary_factor": 0.75}
    (source / "config.json").write_text(json.dumps(config | {"rope_parameters": rope, "dtype": "float16"}))
    convert(source, tmp_path / "out", rank=16, device="cpu")
    written = read_config(tmp_path / "out")
    assert (written["rotary_pct"], written["rotary_emb_base"], written["rope_parameters"]) == (0.75, 500, rope)
    assert written["torch_dtype"] == "float16"


def test_card(dense: Path, factored: Path) -> None:
    text = (factored / "README.md").read_text()
    for words in (
        "language: ko",
        "license: apache-2.0",
        "- korean",
        "library_name: transformers",
        "return_token_type_ids=False",
        "Method `svd`: plain truncated SVD",
        "Layout `balanced`",
        "trust_remote_code=True",
        "query_key_value",
        "--rank 16",
        f"{plan(dense, rank=16).params_after:,}",
    ):
        assert words in text, words


def test_card_of_a_source_whose_card_begins_with_a_byte_order_mark(dense: Path, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "model")
    (source / "README.md").write_text("\ufeff" + (dense / "README.md").read_text(), encoding="utf-8")
    convert(source, tmp_path / "out", rank=16, device="cpu", check=False)
    assert "license: apache-2.0" in (tmp_path / "out" / "README.md").read_text()


def test_same_command_again_does_nothing(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    report = convert(dense, tmp_path / "out", rank=16, device="cpu")
    assert report.outcome.already_done
    assert len(report.errors) == len(TARGETS)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_overwrite_leaves_nothing_of_the_old_result(dense: Path, factored: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(dense, out, rank=8, device="cpu", max_shard_size="20kB")
    (out / "notes.txt").write_text("mine")
    convert(dense, out, rank=16, device="cpu", overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert tree(out) == tree(factored)


def test_report(dense: Path, factored: Path, tmp_path: Path) -> None:
    report = convert(dense, tmp_path / "out", rank=16, device="cpu")
    assert report.folder == tmp_path / "out"
    assert report.matrices.keys() == set(TARGETS)
    assert 0 < max(report.errors) < 1
    assert report.outcome.seconds > 0
    assert report.outcome.peak_memory_bytes > 50_000_000
    assert any("100" in check or "missing" in check for check in report.outcome.checks)
    assert any("finite" in check for check in report.outcome.checks)
    assert math.isfinite(json.loads(json.dumps(report.to_json()))["matrices"][TARGETS[0]]["relative_error"])


def test_tied_head(tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors.pop("embed_out.weight")
    source = write_checkpoint(tmp_path / "tied", tensors, config={"tie_word_embeddings": True})
    convert(source, tmp_path / "out", rank=16, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in read_weights(tmp_path / "out")

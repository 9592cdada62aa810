"""Checks and perplexity against independent computations."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from svdconvert import InputError, convert, densify, evaluate, fold, report, verify
from svdconvert.commands.evaluate import negative_log_likelihood
from svdconvert.commands.verify import failed
from svdconvert.models.passages import Passage

TEXT = "옛날 옛적에 호랑이가 살았다. Once upon a time there was a tiger.\n" * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def copy(factored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(factored, tmp_path / "copy"))


def test_a_good_result_passes(factored: Path, dense: Path) -> None:
    checks = verify(str(factored), dense)
    assert not failed(checks)
    assert [check.name for check in checks] == [
        "modeling file",
        "ranks",
        "keys and shapes",
        "record",
        "data",
        "logits",
        "copied tensors",
        "factored matrices",
        "outcome",
    ]


def test_folders_as_text(factored: Path, dense: Path) -> None:
    assert verify(str(factored), dense) == verify(factored, str(dense))


def test_another_modeling_file_is_said_and_not_run(copy: Path, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    with (copy / "modeling_polyglot_svd.py").open("a") as handle:
        handle.write(f"\nopen({str(trap)!r}, 'w').close()\n")
    assert [check.name for check in failed(verify(copy))] == ["modeling file"]
    assert not trap.exists()


def test_wrong_rank_in_the_config(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["svd_ranks"]["layers.1.attention.dense"] = 15
    (copy / "config.json").write_text(json.dumps(config))
    bad = failed(verify(copy))
    assert {"ranks", "keys and shapes"} == {check.name for check in bad}
    assert "layers.1.attention.dense" in bad[0].detail


def edit(folder: Path, name: str) -> None:
    """Change one number of one tensor."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_changed_copy_is_found(copy: Path, dense: Path) -> None:
    edit(copy, "gpt_neox.layers.2.attention.dense.up.bias")
    bad = failed(verify(copy, str(dense)))
    assert [check.name for check in bad] == ["data", "copied tensors", "outcome"]
    assert "gpt_neox.layers.2.attention.dense.bias" in bad[1].detail
    assert "block 2" in bad[2].detail


def test_changed_factor_is_found(copy: Path, dense: Path) -> None:
    edit(copy, "gpt_neox.layers.2.attention.dense.down.weight")
    bad = failed(verify(copy, str(dense)))
    assert [check.name for check in bad] == ["data", "factored matrices"]
    assert all("layers.2.attention.dense" in check.detail for check in bad)


def test_a_change_that_the_errors_do_not_show(copy: Path, dense: Path) -> None:
    """At the best factors the error is stationary: a little more of anything is as good as none."""
    name = "gpt_neox.layers.2.attention.dense.down.weight"
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[3] *= 1.01
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    bad = failed(verify(copy, str(dense)))
    assert [(check.name, check.detail) for check in bad] == [("data", f"changed since: {name}")]


def test_a_result_without_a_record_of_its_data(copy: Path) -> None:
    record = json.loads((copy / "svdconvert.json").read_text())
    assert record.pop("tensors").keys() == load_file(copy / "model.safetensors").keys()
    assert len(record.pop("digest")) == 32
    (copy / "svdconvert.json").write_text(json.dumps(record))
    checks = verify(copy)
    assert not failed(checks)
    assert not {"record", "data"} & {check.name for check in checks}


def test_a_changed_record_is_found(copy: Path) -> None:
    """Whatever it says of the result; times and the way in which it is written do not count."""
    path = copy / "svdconvert.json"
    record = json.loads(path.read_text())
    name = next(iter(record["matrices"]))
    record["matrices"][name]["seconds"] += 1
    path.write_text(json.dumps(dict(reversed(record.items()))))
    report(copy)
    assert not failed(verify(copy)), "a page is added by svdconvert"
    record = json.loads(path.read_text())
    assert "report.html" in record["files"]
    record["matrices"][name]["relative_error"] /= 2
    record["files"].remove("report.html")
    (copy / "report.html").unlink()
    path.write_text(json.dumps(record))
    for _ in ("as it was changed", "with a page beside it"):
        (bad,) = failed(verify(copy))
        assert (bad.name, bad.detail) == ("record", "svdconvert.json was changed since")
        report(copy)
    assert "report.html" in json.loads(path.read_text())["files"]


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("rotary_pct", 1.0, "block "),
        ("layer_norm_eps", 0.5, "block "),
        ("use_parallel_residual", False, "block "),
        ("hidden_act", "relu", "block "),
        ("tie_word_embeddings", True, "the logits"),
    ],
)
def test_changed_settings_are_found(field: str, value: object, what: str, copy: Path, dense: Path) -> None:
    """Every tensor is the source's, and yet it is another model."""
    path = copy / "config.json"
    config = json.loads(path.read_text()) | {field: value}
    config.pop("rope_parameters")
    path.write_text(json.dumps(config))
    bad = failed(verify(copy, str(dense)))
    assert bad[-1].name == "outcome"
    assert what in bad[-1].detail


def test_changed_head_is_found(dense: Path, copy: Path, tmp_path: Path) -> None:
    """That of the result, or one of the source that by its config is a copy of the embedding."""
    edit(copy, "lm_head.weight")
    assert [check.name for check in failed(verify(copy, str(dense)))] == ["data", "copied tensors", "outcome"]
    source = write_checkpoint(tmp_path / "source", config={"tie_word_embeddings": True})
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["gpt_neox.embed_in.weight"]
    save_file(
        tensors | {"embed_out.weight": embedding.clone()}, source / "model.safetensors", metadata={"format": "pt"}
    )
    convert(source, tmp_path / "out", rank=16, device="cpu")
    assert not failed(verify(tmp_path / "out", str(source)))
    edit(source, "embed_out.weight")
    bad = failed(verify(tmp_path / "out", str(source)))
    assert [check.name for check in bad] == ["copied tensors"]
    assert "embed_out.weight" in bad[0].detail


@pytest.mark.parametrize(
    "how", [{"share_layers": 3}, {"split_fused": True}, {"layout": "pivoted", "split_fused": True}]
)
def test_every_layout_has_the_outcome(how: dict[str, Any], dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu", dtype="bfloat16", **how)
    checks = verify(tmp_path / "out", str(dense))
    assert not failed(checks)
    assert checks[-1].name == "outcome"


def test_pivoted(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, layout="pivoted", device="cpu")
    assert not failed(verify(tmp_path / "out", str(dense)))
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    position = tensors["gpt_neox.layers.1.attention.dense.position"]
    position[[3, 30]] = position[[30, 3]]
    save_file(tensors, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    assert [check.name for check in failed(verify(tmp_path / "out", str(dense)))] == ["data", "factored matrices"]


@pytest.mark.parametrize("change", ["averaged", "not loaded", "out of range", "floats"])
def test_positions_that_are_no_permutation(dense: Path, tmp_path: Path, change: str) -> None:
    """By verify, and nothing is made of them."""
    folder = tmp_path / "out"
    convert(dense, folder, rank=16, layout="pivoted", device="cpu")
    tensors = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.1.attention.dense.position"
    position = tensors[name]
    tensors[name] = {
        "averaged": (position + position.roll(1)) // 2,
        "not loaded": torch.full_like(position, -1),
        "out of range": position + 1,
        "floats": position + 0.5,
    }[change]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checks = verify(folder, str(dense))
    assert [check.name for check in failed(checks)] == ["data", "positions"]
    assert checks[-1].detail.startswith(f"{name} is not a permutation")
    with pytest.raises(InputError, match=f"{name} of .* is not a permutation"):
        densify(folder, tmp_path / "densified", device="cpu")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    path = "base_model.model.gpt_neox.layers.0.attention.dense.lora_"
    lora = {path + "A.weight": torch.ones(2, position.numel()), path + "B.weight": torch.ones(position.numel(), 2)}
    save_file(lora, adapter / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"{name} of .* is not a permutation"):
        fold(folder, adapter, tmp_path / "folded", device="cpu")
    assert not (tmp_path / "densified" / "config.json").exists()


def test_non_finite_logits_are_found(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"][5] = math.nan
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert [check.name for check in failed(verify(copy))] == ["data", "logits"]


def test_another_dtype_is_compared_in_it(dense: Path, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", rank=16, device="cpu", dtype="bfloat16")
    assert not failed(verify(tmp_path / "out", str(dense)))


def by_hand(folder: Path, window: int, stride: int) -> tuple[float, int]:
    """Every token predicted by its own forward pass over exactly the context that the window gives it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).float().eval()
    ids = [tokenizer.eos_token_id, *tokenizer(TEXT)["input_ids"]]
    total, done, begin = 0.0, 0, 0
    with torch.inference_mode():
        while done < len(ids) - 1:
            end = min(begin + window, len(ids) - 1)
            begin = max(end - window, 0)
            for position in range(done, end):
                logits = model(torch.tensor([ids[begin : position + 1]])).logits[0, -1]
                total -= float(logits.double().log_softmax(-1)[ids[position + 1]])
            done, begin = end, begin + stride
    return total, len(ids) - 1


@pytest.mark.parametrize(("window", "stride"), [(64, 32), (32, 8), (50, 49), (16, 16 - 1)])
def test_perplexity(window: int, stride: int, factored: Path, text: Path) -> None:
    total, tokens = by_hand(factored, window, stride)
    result = evaluate(factored, text, window=window, stride=stride, device="cpu", batch_size=3)
    assert result.tokens == tokens
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert result.bits_per_character == pytest.approx(total / math.log(2) / len(TEXT), rel=1e-4)
    assert (result.window, result.stride, result.dtype) == (window, stride, "float32")


def test_short_text(factored: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a")
    result = evaluate(factored, tmp_path / "short.txt", device="cpu")
    assert result.tokens == 1
    assert math.isfinite(result.perplexity)


def test_batches_change_nothing(dense: Path, text: Path) -> None:
    one, many = (evaluate(dense, text, window=32, batch_size=size, device="cpu") for size in (1, 64))
    assert one.perplexity == pytest.approx(many.perplexity, rel=1e-6)


@pytest.mark.parametrize("pickled", [False, True])
def test_an_index_without_metadata(pickled: bool, dense: Path, text: Path, tmp_path: Path) -> None:
    """transformers does not load such a model, whose tensors are all there."""
    folder = write_checkpoint(tmp_path / "model", shards=2, pickled=pickled)
    (path,) = folder.glob("*.index.json")
    for metadata in ({}, {"metadata": "none"}):
        path.write_text(json.dumps({"weight_map": json.loads(path.read_text())["weight_map"]} | metadata))
        assert evaluate(folder, text, device="cpu").perplexity == evaluate(dense, text, device="cpu").perplexity


def test_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    class Uniform(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> object:
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 7)})

    seen = []
    passage = Passage(torch.arange(101) % 7, 100, 10, 3)
    total = negative_log_likelihood(Uniform(), passage, 4, lambda done, everything: seen.append((done, everything)))
    assert total == pytest.approx(100 * math.log(7), rel=1e-6)
    assert seen[-1] == (100, 100)


def test_tokenizer_of_another_model(dense: Path, text: Path, tmp_path: Path) -> None:
    from svdconvert import InputError

    folder = write_checkpoint(tmp_path / "small", config={"vocab_size": 50})
    with pytest.raises(InputError, match="another model"):
        evaluate(folder, text, device="cpu")

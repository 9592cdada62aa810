"""Data-aware conversions, whole: text in, checkpoint out, against the recipes written out in memory."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.checkpoints import LINEARS, TARGETS, random_tensors, read_config, read_weights, tree, write_checkpoint
from support.methods import DATA_AWARE, gradients
from support.results import products
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, Events, InputError, calibrate, convert
from svdconvert.factoring import decomposer
from svdconvert.methods.table import METHODS, method_named, shrink, unshrink
from svdconvert.planning.ranks import Target

Run = Callable[..., SimpleNamespace]


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
@pytest.mark.parametrize("method", DATA_AWARE)
def test_every_method_gives_a_model(
    method: str, layout: str, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    report = convert(
        dense, tmp_path / "out", keep=0.5, method=method, calibration=calibration, layout=layout, device="cpu"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.num_parameters() == report.plan.params_after
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    assert record["settings"]["method"] == method
    assert record["settings"]["samples"] == 24
    assert record["settings"]["layout"] == layout
    assert ("predicted_loss" in record) == (method == "kfac")
    assert f"--method {method}" in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / ".svdconvert").exists()


def test_whiten_is_svd_llm(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Against arXiv:2403.07378 as published: Cholesky root of the Gram matrix, full SVD of W S, inverse."""
    convert(dense, tmp_path / "out", rank=16, method="whiten", calibration=calibration, dtype="float32", device="cpu")
    found, weights = products(tmp_path / "out"), read_weights(dense)
    for name, (gram, _, _) in gradients(dense, calibration).items():
        weight = weights[f"gpt_neox.{name}.weight"].double()
        s = torch.linalg.cholesky(gram + 1e-12 * gram.diagonal().mean() * torch.eye(len(gram)).double())
        u, values, v = torch.linalg.svd(weight @ s, full_matrices=False)
        theirs = (u[:, :16] * values[:16]) @ v[:16] @ torch.linalg.inv(s)

        def loss(product: torch.Tensor, gram: torch.Tensor = gram, weight: torch.Tensor = weight) -> float:
            return float(((weight - product) @ gram * (weight - product)).sum())

        assert loss(found[f"gpt_neox.{name}.weight"]) == pytest.approx(loss(theirs), rel=1e-4), name


@pytest.mark.parametrize("shrinkage", [None, 0.0])
def test_kfac_is_optimal_in_both_metrics(
    shrinkage: float | None, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    settings = {"method": "kfac", "calibration": calibration, "shrinkage": shrinkage, "dtype": "float32"}
    report = convert(dense, tmp_path / "out", rank=16, device="cpu", **settings)
    amount = METHODS["kfac"].options["shrinkage"] if shrinkage is None else shrinkage
    assert report.outcome.record["settings"]["shrinkage"] == amount
    found, weights, total = products(tmp_path / "out"), read_weights(dense), 0.0
    for name, (inputs, outputs, _) in gradients(dense, calibration).items():
        weight = weights[f"gpt_neox.{name}.weight"].double()
        inputs, outputs = ((1 - amount) * gram + amount * gram.diagonal().diag() for gram in (inputs, outputs))
        roots = []
        for gram in (outputs, inputs):
            values, vectors = torch.linalg.eigh(gram)
            roots.append((vectors * values.clamp_min(0).sqrt()) @ vectors.T)
        tail = float(torch.linalg.svdvals(roots[0] @ weight @ roots[1])[16:].square().sum())
        error = weight - found[f"gpt_neox.{name}.weight"]
        assert float((outputs @ error @ inputs * error).sum()) == pytest.approx(tail, rel=1e-3), name
        assert report.matrices[name]["lost"] == pytest.approx(tail, rel=1e-3)
        total += tail
    assert report.outcome.record["predicted_loss"] == pytest.approx(total / 2, rel=1e-3)


def following_step(targets: Sequence[Target], multiple: int = 1) -> int:
    """Parameters of the cheapest step that any matrix could still take, to its next rank or to staying dense."""
    steps = []
    for target in targets:
        if target.rank is not None:
            cost = target.layout.cost(target.rank + multiple, target.shape)
            steps.append(min(cost, target.dense_params) - target.params)
    return min(steps)


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_global_budget_is_spent(
    keep: float, layout: str, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    report = convert(
        dense,
        tmp_path / "out",
        keep=keep,
        method="kfac",
        calibration=calibration,
        work=work,
        layout=layout,
        check=False,
    )
    whole = sum(rows * columns for rows, columns in LINEARS.values()) * 3
    spent = sum(target.params for target in report.plan.targets)
    assert spent <= keep * whole
    # What is left does not buy one more rank of any matrix.
    assert keep * whole - spent < following_step(report.plan.targets)
    if keep < 0.9:
        assert len(set(read_config(tmp_path / "out")["svd_ranks"].values())) > 2
    uniform = convert(
        dense, tmp_path / "uniform", keep=keep, method="kfac", calibration=calibration, work=work, layout=layout,
        allocation="uniform", check=False,
    )  # fmt: skip
    assert report.outcome.record["predicted_loss"] <= uniform.outcome.record["predicted_loss"]


def test_global_budget_in_multiples(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    report = convert(
        dense, tmp_path / "out", keep=0.6, method="kfac", calibration=calibration, rank_multiple=8, check=False
    )
    ranks = set(read_config(tmp_path / "out")["svd_ranks"].values())
    assert len(ranks) > 1
    assert not any(rank % 8 for rank in ranks)
    budget = int(0.6 * sum(target.dense_params for target in report.plan.targets))
    unused = budget - sum(target.params for target in report.plan.targets)
    assert 0 <= unused < following_step(report.plan.targets, 8)
    assert f"leaves {unused:,} parameters of the budget unused" in " ".join(report.plan.notes)
    assert "--keep 0.6 --rank-multiple 8 --method kfac" in (tmp_path / "out" / "README.md").read_text()


def test_finished_budget_is_reported_as_it_was_spent(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    settings = {"keep": 0.5, "method": "kfac", "calibration": calibration, "device": "cpu", "check": False}
    first = convert(dense, tmp_path / "out", **settings)
    again = convert(dense, tmp_path / "out", **settings)
    assert again.outcome.already_done
    assert again.plan.ranks == first.plan.ranks == read_config(tmp_path / "out")["svd_ranks"]
    assert again.plan.params_after == first.plan.params_after


def test_kept_decompositions_spare_the_calibration(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    settings = {"method": "whiten", "calibration": calibration, "device": "cpu", "check": False}
    convert(dense, tmp_path / "one", keep=0.5, **settings)
    convert(dense, tmp_path / "other", keep=0.3, work=work, **settings)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was computed again")

    monkeypatch.setattr(decomposer, "decompose", fail)
    convert(dense, tmp_path / "two", keep=0.5, work=work, **settings)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize("method", ["whiten", "kfac"])
@pytest.mark.parametrize("after", [1, 5, 11])
def test_interrupted_and_continued(
    method: str,
    after: int,
    dense: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"keep": 0.5, "method": method, "calibration": calibration, "device": "cpu", "check": False}
    convert(dense, tmp_path / "undisturbed", **settings)
    real, calls = decomposer.decompose, []

    def breaks(*args: object, **kwargs: object) -> object:
        calls.append(1)
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(decomposer, "decompose", breaks)
    with pytest.raises(KeyboardInterrupt):
        convert(dense, tmp_path / "out", **settings)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    calls.clear()
    calls.extend([1] * 1000)
    convert(dense, tmp_path / "out", **settings)
    assert len(calls) - 1000 == len(TARGETS) - after
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


def test_statistics_collected_beforehand(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    settings = {"keep": 0.5, "device": "cpu", "check": False}
    perplexity = calibrate(dense, calibration, tmp_path / "stats", methods=["kfac", "asvd"], device="cpu")
    assert perplexity is not None
    assert 1 < perplexity < 1e6
    assert {path.name for path in (tmp_path / "stats").iterdir()} == {
        "stats.json",
        "tokens.safetensors",
        *(f"block-{i:05d}.safetensors" for i in range(3)),
    }
    for method in ("kfac", "whiten", "asvd"):
        convert(dense, tmp_path / f"{method}-text", method=method, calibration=calibration, **settings)
        convert(dense, tmp_path / f"{method}-stats", method=method, stats=tmp_path / "stats", **settings)
        one, two = (read_weights(tmp_path / f"{method}-{kind}") for kind in ("text", "stats"))
        if method == "kfac":  # shrunk, it takes float32 sums from a text, while a folder's serve every method
            for name, tensor in one.items():
                torch.testing.assert_close(
                    two[name].float(), tensor.float(), rtol=0, atol=1e-2 * float(tensor.abs().max())
                )
        else:
            assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError, match="no fisher"):
        convert(dense, tmp_path / "fwsvd", method="fwsvd", stats=tmp_path / "stats", **settings)


def test_statistics_of_another_tokenizer_or_version(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrate(dense, calibration, tmp_path / "stats", methods=["whiten"], device="cpu")
    settings = {"keep": 0.5, "method": "whiten", "stats": tmp_path / "stats", "device": "cpu", "check": False}
    other = tmp_path / "other"
    shutil.copytree(dense, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="statistics of another tokenizer"):
        convert(other, tmp_path / "out", **settings)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (other / name).unlink(missing_ok=True)
    convert(other, tmp_path / "without", **settings)  # none that could be another one
    monkeypatch.setattr("svdconvert.calibration.folder.__version__", "0")
    monkeypatch.setattr("svdconvert.calibration.knowledge.__version__", "0")
    with pytest.raises(InputError, match="statistics of another version"):
        convert(dense, tmp_path / "out", **settings)


def test_statistics_of_another_model(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", random_tensors(seed=9))
    calibrate(other, calibration, tmp_path / "stats", methods=["whiten"], device="cpu")
    with pytest.raises(InputError, match="another model"):
        convert(dense, tmp_path / "out", keep=0.5, method="whiten", stats=tmp_path / "stats", device="cpu")


def test_another_text_is_refused(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    work = tmp_path / "work"
    convert(dense, tmp_path / "one", keep=0.5, method="whiten", calibration=calibration, work=work, check=False)
    other = Calibration(calibration.text, samples=20, length=48)
    with pytest.raises(InputError, match="another calibration"):
        convert(dense, tmp_path / "two", keep=0.5, method="whiten", calibration=other, work=work, check=False)
    with pytest.raises(InputError, match="another method"):
        convert(dense, tmp_path / "two", keep=0.5, method="kfac", calibration=calibration, work=work, check=False)
    with pytest.raises(InputError, match="another calibration"):
        convert(dense, tmp_path / "one", keep=0.5, method="whiten", calibration=other, check=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "whiten"}, "needs a text"),
        ({"method": "nonsense"}, "unknown; choose one of svd, asvd"),
        ({"method": "svd", "alpha": 0.3}, "alpha has no effect on method=.svd."),
        ({"method": "asvd", "alpha": 3.0}, "between 0 and 1"),
        ({"method": "whiten", "shrinkage": -0.1}, "between 0 and 1"),
        ({"allocation": "nonsense"}, "unknown; choose uniform, global or measured"),
        ({"layout": "nonsense"}, "unknown; choose balanced or pivoted"),
    ],
)
def test_refusals(arguments: dict[str, object], words: str, dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        convert(dense, tmp_path / "out", keep=0.5, device="cpu", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_text_for_a_method_that_needs_none(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no effect on method='svd'"):
        convert(dense, tmp_path / "out", keep=0.5, method="svd", calibration=calibration)


def test_missing_text(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        convert(dense, tmp_path / "out", keep=0.5, method="whiten", calibration=Calibration("nowhere.txt"))
    assert not (tmp_path / "out").exists()


class Notes(Events):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.all: list[str] = []

    def note(self, text: str) -> None:
        self.all.append(text)


@pytest.mark.parametrize("method", ["svd", "whiten", "kfac"])
def test_a_global_budget_of_other_methods_comes_with_a_warning(
    method: str, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    notes = Notes()
    text = calibration if METHODS[method].statistics else None
    settings = {"keep": 0.5, "method": method, "calibration": text, "device": "cpu", "check": False}
    convert(dense, tmp_path / "out", allocation="global", events=notes, **settings)
    assert any(f"those of {method} are not made for" in note for note in notes.all) == (method != "kfac")


def test_what_was_looked_at_is_told(dense: Path, calibration: Calibration, tmp_path: Path, run: Run) -> None:
    line = [dense, "--keep", 0.5, "--calib", calibration.text, "--calib-samples", 24, "--calib-length", 48]
    said = run(*line, "--shrinkage", 0.25, "--device", "cpu", "--out", tmp_path / "out")
    assert said.code == 0, said
    assert re.search(r"calibration +1,152 tokens, shrinkage 0\.25 *\n", said.out)
    assert "Calibrated on 1,152 tokens, shrinkage 0.25." in (tmp_path / "out" / "README.md").read_text()
    settings = json.loads((tmp_path / "out" / "svdconvert.json").read_text())["settings"]
    assert (settings["tokens"], settings["shrinkage"]) == (1152, 0.25)


def test_too_few_tokens_and_aliases_are_said(dense: Path, text: Path, tmp_path: Path) -> None:
    notes = Notes()
    few = Calibration(str(text), samples=2, length=16)
    convert(dense, tmp_path / "out", keep=0.5, method="drone", calibration=few, device="cpu", events=notes)
    assert "drone has the same optimum as whiten, which computes it" in notes.all
    assert any("fewer than the 256 channels" in note for note in notes.all)


def test_aliases() -> None:
    assert method_named("drone") is METHODS["whiten"]


def test_shrinkage() -> None:
    gram = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    assert torch.equal(shrink(gram, 0), gram)
    assert torch.equal(shrink(gram, 1), gram.diagonal().diag())
    assert torch.allclose(shrink(gram, 0.5), torch.tensor([[2.0, 0.5], [0.5, 4.0]]))
    assert all(torch.allclose(unshrink(shrink(gram, amount), amount), gram) for amount in (0, 0.2, 0.9))

"""The smallest size within a limit: what is measured is what the written model loses, and a step less misses it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import tree
from support.families import write_family
from support.refusals import assert_refused
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, InputError, JobError, convert
from svdconvert.factoring.refit_streams import HELD_OUT
from svdconvert.models.stream import Stream
from svdconvert.planning.size_search import STEPS
from svdconvert.storage.source import LocalSource

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_polyglot"


def held_out(folder: Path, calibration: Calibration) -> torch.Tensor:
    """Token ids of the held-out sequences."""
    return calibration.tokens(LocalSource(folder)).ids[HELD_OUT - 1 :: HELD_OUT]


def reference(dense: Path, result: Path, ids: torch.Tensor) -> tuple[float, float]:
    """(mean KL, added loss) of a written model, from whole models in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).double().eval()
        for folder in (dense, result)
    ]
    with torch.no_grad():
        p, q = (model(ids).logits[:, :-1].log_softmax(-1) for model in models)
    labels = ids[:, 1:, None]
    return float((p.exp() * (p - q)).sum(-1).mean()), float((p - q).gather(-1, labels).mean())


@pytest.mark.parametrize(
    ("limit", "settings"),
    [
        ({"max_kl": 0.01}, {"layout": "pivoted"}),
        ({"max_loss": 0.05}, {"allocation": "uniform", "dtype": "float32"}),
        ({"max_kl": 0.01}, {"share_layers": 2, "method": "whiten", "allocation": "global", "rank_multiple": 4}),
    ],
    ids=["global", "uniform", "shared"],
)
def test_the_smallest_size_is_found(
    limit: dict[str, float], settings: dict[str, Any], dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    if "max_loss" in limit:  # a random model's loss has no direction
        dense = EXAMPLE / "model"
        calibration = Calibration(str(EXAMPLE / "calibration.txt"), samples=16, length=32)
    settings = {**settings, "calibration": calibration, "device": "cpu", "work": work}
    report = convert(dense, tmp_path / "out", **limit, **settings)
    record = report.outcome.record
    found = record["budget"]
    kl, added = reference(dense, tmp_path / "out", held_out(dense, calibration))
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    assert found["added"] == pytest.approx(added, rel=1e-3, abs=1e-5)
    ((name, most),) = limit.items()
    field = {"max_kl": "kl", "max_loss": "added"}[name]
    assert found[field] <= most
    smaller = found["share"] - 1 / STEPS
    (below,) = [size for size in found["sizes"] if size["share"] == pytest.approx(smaller)]
    assert below[field] > most
    # It is what that size gives when it is asked for.
    del settings["work"]
    same = convert(dense, tmp_path / "same", keep=found["share"], **settings)
    assert tree(tmp_path / "same")["model.safetensors"] == tree(tmp_path / "out")["model.safetensors"]
    assert "budget" not in same.outcome.record
    assert record["settings"] | {"keep": found["share"]} == same.outcome.record["settings"] | limit
    # Another limit measures only what is new.
    trials = set((work / "trials").iterdir())
    again = convert(dense, tmp_path / "again", **{name: most * 1.5}, **settings, work=work, check=False)
    first, second = ({size["share"] for size in one["sizes"]} for one in (found, again.outcome.record["budget"]))
    assert first & second
    assert len(set((work / "trials").iterdir()) - trials) == len(second - first)


def test_grouped_queries_and_a_tied_head(calibration: Calibration, tmp_path: Path) -> None:
    dense = write_family(tmp_path / "dense", "llama", tie_word_embeddings=True)
    report = convert(dense, tmp_path / "out", max_kl=0.02, calibration=calibration, dtype="float32", device="cpu")
    kl, added = reference(dense, tmp_path / "out", held_out(dense, calibration))
    assert report.outcome.record["budget"]["kl"] == pytest.approx(kl, rel=1e-3)
    assert report.outcome.record["budget"]["added"] == pytest.approx(added, rel=1e-3, abs=1e-5)


def test_a_broken_search_goes_on(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_kl": 0.01, "calibration": calibration, "device": "cpu"}
    convert(dense, tmp_path / "whole", **settings)
    original, steps = Stream.step, []

    def step(self: Stream, block: torch.nn.Module, index: int) -> None:
        steps.append(index)
        if len(steps) == 11:  # the dense model, two sizes and a part of the third
            raise JobError("the disk is full")
        original(self, block, index)

    monkeypatch.setattr(Stream, "step", step)
    with pytest.raises(JobError, match="disk is full"):
        convert(dense, tmp_path / "out", **settings)
    assert len(list((tmp_path / "out" / ".svdconvert" / "work" / "trials").iterdir())) == 2
    del steps[:]
    steps += [-1] * 20
    convert(dense, tmp_path / "out", **settings)
    assert steps[20:22] == [1, 2], "the dense model and two sizes were there, and a block of the third"
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert not (tmp_path / "out" / ".svdconvert").exists()


def test_on_the_command_line(dense: Path, text: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]) -> None:
    words = [dense, "--max-kl", 0.01, "--calib", text, "--calib-samples", 16, "--calib-length", 32, "--device", "cpu"]
    said = run(*words, "--out", tmp_path / "out", "--report")
    assert said.code == 0, said.err
    page = (tmp_path / "out" / "report.html").read_bytes()
    assert run("report", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == page
    assert "--refit" not in said.out, "it might exceed the limit"
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    share = f"{record['budget']['share']:.1%} of the target parameters kept"
    assert said.out.count(share) == 2, "when it is found, and at the end"
    card = (tmp_path / "out" / "README.md").read_text()
    assert share in card
    assert "--max-kl 0.01" in card
    again = run(*words, "--out", tmp_path / "out")
    assert "already holds this result" in again.out
    assert json.loads(run(*words, "--out", tmp_path / "out", "--json").out)["losses"]["budget"] == record["budget"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-kl", 1e-7], ["--max-kl 1e-07 cannot be met: 99.5% of the target parameters kept", "nats per token"]),
        (["--max-loss", 0.1, "--calib-samples", 1], ["at least 2 calibration sequences, one of them held out"]),
        (
            ["--max-loss", 0.1, "--keep", 0.5],
            ["exactly one of --rank, --keep, --params, --bytes, --fit, --max-loss and --max-kl"],
        ),
        (["--max-loss", -1], ["--max-loss -1 must be above 0"]),
        (["--max-kl", "nan"], ["--max-kl nan must be above 0"]),
        (["--max-kl", 0.1, "--refit", "sequential"], ["--refit sequential is judged by the loss", "--max-loss"]),
        (["--max-kl", 0.1, "--dry-run"], ["a plan cannot know the size that --max-kl 0.1 leads to"]),
    ],
)
def test_what_cannot_be(
    options: list[object], words: list[str], dense: Path, text: Path, tmp_path: Path,
    run: Callable[..., SimpleNamespace],
) -> None:  # fmt: skip
    calib = ["--calib", text, "--calib-length", 32, "--device", "cpu"]
    calib += [] if "--calib-samples" in options else ["--calib-samples", 8]
    assert_refused(run(dense, *options, *calib, "--out", tmp_path / "out"), *words)


def test_decompositions_that_cannot_be_read(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage is no size that is too small."""

    def damaged(*_: object) -> None:
        raise InputError("the file is damaged")

    monkeypatch.setattr("svdconvert.commands.measured_budgets.spend", damaged)
    with pytest.raises(InputError, match="the file is damaged"):
        convert(dense, tmp_path / "out", max_kl=0.01, calibration=calibration, device="cpu")


def test_plain_svd_that_was_measured(
    dense: Path, text: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]
) -> None:
    """Nobody is warned of a loss that was measured, or told to give the text that is there."""
    words = ["--calib", text, "--calib-samples", 16, "--calib-length", 32, "--device", "cpu"]
    said = run(dense, "--max-kl", 0.1, "--method", "svd", *words, "--out", tmp_path / "out")
    assert said.code == 0, said.err
    assert "without a text" not in said.out
    assert "evaluate" in said.out


def test_without_a_text(dense: Path, tmp_path: Path, run: Callable[..., SimpleNamespace]) -> None:
    assert_refused(run(dense, "--max-loss", 0.1, "--out", tmp_path / "out"), "--max-loss 0.1 needs a text")
    assert_refused(run("plan", dense, "--max-loss", 0.1), "a plan cannot know", "plan --keep or --params")

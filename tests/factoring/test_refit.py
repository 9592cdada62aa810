"""The sequential refit and the measured loss, against the same sums written out in memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from support.checkpoints import tree
from support.results import products
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from svdconvert import Calibration, JobError, calibrate, convert
from svdconvert.commands.report import LOSSES
from svdconvert.factoring import refit as refitting
from svdconvert.factoring import regression
from svdconvert.factoring.refit_files import Refit
from svdconvert.factoring.refit_streams import HELD_OUT
from svdconvert.storage.source import LocalSource


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of random syllables: their hidden states fill the space."""
    draw = random.Random(0)
    syllables = [chr(0xAC00 + draw.randrange(11172)) for _ in range(300)] + list("abcdefghijklmnopqrstuvwxyz")
    lines = [" ".join("".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(40)) for _ in range(120)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibration(text: Path) -> Calibration:
    return Calibration(str(text), samples=48, length=48, batch_size=20)


def captured(model: torch.nn.Module, ids: torch.Tensor, names: list[str]) -> dict[str, tuple[torch.Tensor, ...]]:
    """(input, output) of linear layers, [tokens, n] in the model's own type."""
    seen: dict[str, tuple[torch.Tensor, ...]] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen.update({name: (args[0].flatten(0, 1), output.flatten(0, 1))})
        )
        for name in names
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


def nll(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        logits = model(ids).logits.double()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
def test_refit_is_the_ridge_regression_on_the_compressed_models_inputs(
    layout: str, dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regression, "DAMPINGS", (1e-3,))
    monkeypatch.setattr(Refit, "accepted", True)
    settings = {"keep": 0.5, "method": "whiten", "calibration": calibration, "layout": layout, "device": "cpu"}
    convert(dense, tmp_path / "plain", dtype="float32", **settings)
    report = convert(dense, tmp_path / "refit", dtype="float32", refit="sequential", **settings)
    before, after = products(tmp_path / "plain"), products(tmp_path / "refit")

    ids = calibration.tokens(LocalSource(dense)).ids
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    exact = GPTNeoXForCausalLM.from_pretrained(dense).double().eval()
    mine = GPTNeoXForCausalLM.from_pretrained(dense).double().eval()
    order = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    changed = 0
    for index in range(exact.config.num_hidden_layers):
        block = f"gpt_neox.layers.{index}"
        writers = {f"{block}.attention.dense", f"{block}.mlp.dense_4h_to_h"}
        names = [f"{block}.{name}" for name in order]
        streams = [f"{block}.input_layernorm"]
        for name in names:
            full = captured(exact, ids[~held], names + streams)
            ours = captured(mine, ids[~held], names + streams)
            wanted, x = full[name][1] - exact.get_submodule(name).bias.detach(), ours[name][0]
            if name in writers:
                wanted = wanted + full[streams[0]][0] - ours[streams[0]][0]
                for other in writers & set(names[: names.index(name)]):
                    wanted = wanted + full[other][1] - ours[other][1]
            # Any factorization of the truncation will do for its row space; the pull depends on the basis, and is
            # small, so that the comparison is of the errors on the very tokens of the regression.
            _, _, v = torch.linalg.svd(before[f"{name}.weight"].double(), full_matrices=False)
            rank = report.matrices[name.removeprefix("gpt_neox.")]["rank"]
            z = x @ v[:rank].T
            best = torch.linalg.lstsq(z, wanted).solution
            least = float((wanted - z @ best).square().sum())
            truncated = float((wanted - x @ before[f"{name}.weight"].double().T).square().sum())
            found = float((wanted - x @ after[f"{name}.weight"].double().T).square().sum())
            if report.matrices[name.removeprefix("gpt_neox.")]["refit"]["damping"] is None:
                assert found == pytest.approx(truncated, rel=1e-3), name
            else:
                changed += 1
                assert least * (1 - 1e-6) <= found <= least + 0.05 * (truncated - least) + 1e-6 * truncated, name
            # the layer as it is stored is what the next ones see
            mine.get_submodule(name).weight.data = after[f"{name}.weight"].double()
    assert changed >= 2


def test_measured_loss_is_that_of_the_result(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    report = convert(
        dense, tmp_path / "out", keep=0.4, calibration=calibration, refit="sequential", dtype="float32", device="cpu"
    )
    ids = calibration.tokens(LocalSource(dense)).ids
    theirs = nll(GPTNeoXForCausalLM.from_pretrained(dense, dtype=torch.float32), ids)
    mine = nll(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True), ids)
    record = report.outcome.record
    assert record["dense_loss"] == pytest.approx(theirs, abs=1e-5)
    assert record["measured_loss"] == pytest.approx(mine - theirs, abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{record['dense_loss']:.4f} before, {record['measured_loss']:+.4f} by this conversion" in card
    assert f"({record['predicted_loss']:+.4f} predicted)" in card
    assert report.to_json()["losses"] == {name: record[name] for name in LOSSES if name in record}
    assert "budget" not in record, "none was measured"
    told = record["refit"]
    assert told["tokens"] == ids.numel() - 48 * (len(ids) // HELD_OUT)
    assert all("held_out_error" in matrix.get("refit", {}) for matrix in record["matrices"].values()) == (
        told["refitted"] < told["truncated"]
    )


def test_a_refit_that_does_not_help_is_not_taken(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = convert(dense, tmp_path / "plain", keep=0.5, calibration=calibration, device="cpu")
    monkeypatch.setattr(Refit, "accepted", False)
    report = convert(dense, tmp_path / "out", keep=0.5, calibration=calibration, refit="sequential", device="cpu")
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "plain")["model.safetensors"]
    assert "refit" in report.outcome.record
    assert not any("refit" in matrix for matrix in report.matrices.values())
    assert plain.outcome.record["measured_loss"] == report.outcome.record["measured_loss"]


def test_a_second_refit_leaves_the_compensation_out(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Refit, "accepted", property(lambda self: not self.compensated))
    report = convert(dense, tmp_path / "out", keep=0.5, calibration=calibration, refit="sequential", device="cpu")
    assert report.outcome.record["refit"]["compensated"] is False
    ids = calibration.tokens(LocalSource(dense)).ids
    held = torch.zeros(len(ids), dtype=torch.bool)
    held[HELD_OUT - 1 :: HELD_OUT] = True
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    assert report.outcome.record["refit"]["refitted"] == pytest.approx(nll(mine, ids[held]), abs=1e-4)


@pytest.mark.parametrize("dtype", ["keep", "float32"])  # kept, it is float16
@pytest.mark.parametrize("layout", ["balanced", "pivoted"])
def test_a_refit_has_to_beat_what_would_be_written_without(
    layout: str, dtype: str, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    settings = {"keep": 0.5, "calibration": calibration, "layout": layout, "dtype": dtype, "device": "cpu"}
    convert(dense, tmp_path / "plain", **settings)
    report = convert(dense, tmp_path / "out", refit="sequential", **settings)
    ids = calibration.tokens(LocalSource(dense)).ids[HELD_OUT - 1 :: HELD_OUT]
    told = report.outcome.record["refit"]
    for folder, loss in (("plain", told["truncated"]), ("out", min(told["refitted"], told["truncated"]))):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True, dtype=torch.float32)
        assert loss == pytest.approx(nll(model, ids), abs=2e-5)


def test_refit_goes_on_where_it_was_broken_off(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"keep": 0.5, "calibration": calibration, "refit": "sequential", "device": "cpu"}
    convert(dense, tmp_path / "whole", **settings)
    original, calls = refitting._Attempt.refit_block, []

    def block(self: refitting._Attempt, module: torch.nn.Module, index: int) -> None:
        calls.append(index)
        if calls == [0, 1]:
            raise JobError("the disk is full")
        original(self, module, index)

    monkeypatch.setattr(refitting._Attempt, "refit_block", block)
    with pytest.raises(JobError, match="disk is full"):
        convert(dense, tmp_path / "out", **settings)
    convert(dense, tmp_path / "out", **settings)
    assert calls[:3] == [0, 1, 1]
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "whole")["model.safetensors"]


def test_statistics_folder_suffices_for_a_refit(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    calibrate(dense, calibration, tmp_path / "stats", methods=["whiten"], device="cpu")
    settings = {"keep": 0.5, "method": "whiten", "refit": "sequential", "device": "cpu"}
    convert(dense, tmp_path / "a", stats=tmp_path / "stats", **settings)
    convert(dense, tmp_path / "b", calibration=calibration, **settings)
    assert products(tmp_path / "a").keys() == products(tmp_path / "b").keys()
    for name, matrix in products(tmp_path / "b").items():
        assert torch.allclose(products(tmp_path / "a")[name], matrix, rtol=0, atol=2e-3 * float(matrix.abs().max()))


def test_refit_of_a_plain_svd(dense: Path, text: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    said = run(dense, "--rank", 12, "--method", "svd", "--refit", "sequential", "--calib", text, "--calib-samples", 16,
               "--calib-length", 32, "--out", tmp_path / "out", "--device", "cpu")  # fmt: skip
    assert said.code == 0, said.err
    assert "nats per token on held-out text" in said.out
    assert "measured on the 512 calibration tokens, to which it was fitted" in " ".join(said.out.split())
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--refit sequential" in card
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    assert record["settings"]["refit"] == "sequential"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refit", "sequential", "--method", "svd"], "--refit sequential needs a text"),
        (["--refit", "sequential", "--calib", "TEXT", "--calib-samples", "1"], "at least 2 calibration sequences"),
        (["--refit", "twice"], "twice"),
    ],
)
def test_bad_input(options: list[str], message: str, dense: Path, text: Path, tmp_path: Path, run) -> None:  # type: ignore[no-untyped-def]
    words = [str(text) if word == "TEXT" else word for word in options]
    length = ["--calib-length", 32] if "--calib" in options else []
    said = run(dense, "--keep", 0.5, *words, *length, "--out", tmp_path / "out", "--device", "cpu")
    assert said.code == 2
    assert message in said.err


def test_default_method_follows_the_text(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    with_text = convert(dense, tmp_path / "a", keep=0.5, calibration=calibration, device="cpu", check=False)
    without = convert(dense, tmp_path / "b", keep=0.5, device="cpu", check=False)
    assert (with_text.plan.method, without.plan.method) == ("kfac", "svd")
    assert with_text.outcome.record["settings"]["allocation"] == "global"

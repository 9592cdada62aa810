"""A sweep is the conversions and evaluations that it stands for, each done once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.checkpoints import random_tensors, write_checkpoint

from svdconvert import Calibration, Events, InputError, convert, evaluate, sweep
from svdconvert.commands import sweep_bench
from svdconvert.commands.sweep_book import Point, Setting
from svdconvert.factoring import decomposer
from svdconvert.settings.conversion import Conversion

Run = Callable[..., SimpleNamespace]
MEASURED = {"window": 48, "device": "cpu", "plot": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "heldout.txt"
    path.write_text("옛날 옛적에 호랑이가 살았다. Once upon a time there was a tiger.\n" * 4, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["호랑이", "tiger", "옛날", "mountain", "살았다", "0123"]
    path.write_text("\n\n".join(" ".join(words[(7 * i + 3 * j * j) % 6] for j in range(12)) for i in range(60)))
    return Calibration(str(path), samples=24, length=48)


def test_against_single_conversions(dense: Path, text: Path, calibration: Calibration, tmp_path: Path) -> None:
    found = sweep(
        dense,
        text,
        tmp_path / "sweep",
        keep=[0.3, 0.6],
        methods=["svd", "whiten", "kfac"],
        layouts=["balanced", "pivoted"],
        calibration=calibration,
        **MEASURED,
    )
    assert len(found.points) == 12
    assert found.dense.perplexity == evaluate(dense, text, window=48, device="cpu").perplexity
    assert {name: [point.setting.keep for point in points] for name, points in found.lines.items()} == {
        f"{method}, {spread}, {layout}": [0.6, 0.3]
        for method, spread in (("svd", "uniform"), ("whiten", "uniform"), ("kfac", "global"))
        for layout in ("balanced", "pivoted")
    }
    for i, point in enumerate(found.points):
        report = convert(
            dense,
            tmp_path / str(i),
            keep=point.setting.keep,
            method=point.setting.method,
            layout=point.setting.layout,
            calibration=None if point.setting.method == "svd" else calibration,
            device="cpu",
            check=False,
        )
        direct = evaluate(tmp_path / str(i), text, window=48, device="cpu")
        # Plain SVD takes another way through the solver, up to rounding; kfac's statistics are float32 sums in a single
        # conversion, while those of a sweep serve every method.
        rounding = {"svd": 1e-3, "kfac": 1e-5, "whiten": 1e-9}[point.setting.method]
        assert point.perplexity == pytest.approx(direct.perplexity, rel=rounding)
        assert point.params == direct.parameters == report.plan.params_after
        assert point.bytes == report.plan.bytes_after
        predicted = report.outcome.record.get("predicted_loss")
        assert point.predicted_loss == (predicted if predicted is None else pytest.approx(predicted, rel=1e-5))
    folder = tmp_path / "sweep"
    assert {path.name for path in folder.iterdir()} == {"sweep.json", "sweep.md"}
    told = json.loads((folder / "sweep.json").read_text())
    assert [Point.from_json(row) for row in told["points"]] == found.points
    table = (folder / "sweep.md").read_text()
    assert len(table.splitlines()) == 2 + 1 + 12
    assert f"{found.points[-1].perplexity:.2f}" in table


def test_finished_points_are_not_redone(
    dense: Path, text: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep"
    real, calls = sweep_bench.run_conversion, []

    def counted(model: Path, out: Path, request: Conversion, events: Events) -> object:
        calls.append(request.size.keep)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, out, request, events)

    monkeypatch.setattr(sweep_bench, "run_conversion", counted)
    arguments = {"methods": ["whiten"], "calibration": calibration, **MEASURED}
    with pytest.raises(KeyboardInterrupt):
        sweep(dense, text, out, keep=[0.3, 0.5, 0.7], **arguments)
    first = json.loads((out / "sweep.json").read_text())
    assert [row["keep"] for row in first["points"]] == [0.7]

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was computed again")

    with monkeypatch.context() as patch:
        patch.setattr(decomposer, "decompose", fail)  # those of the first point are still there
        found = sweep(dense, text, out, keep=[0.3, 0.5, 0.7], **arguments)
    assert calls == [0.7, 0.5, 0.5, 0.3]
    assert found.points[0].to_json() == first["points"][0]
    assert not (out / ".svdconvert").exists()

    more = sweep(dense, text, out, keep=[0.5, 0.4], **arguments)
    assert calls[4:] == [0.4]
    assert [point.setting.keep for point in more.points] == [0.7, 0.5, 0.3, 0.4]
    assert [point.setting.keep for point in more.lines["whiten, uniform, balanced"]] == [0.7, 0.5, 0.4, 0.3]
    plain = sweep(dense, text, out, keep=[0.5], **MEASURED)
    assert len(plain.points) == 5, "a method without a text joins"
    sweep(dense, text, out, keep=[0.5], **MEASURED, overwrite=True)
    assert len(json.loads((out / "sweep.json").read_text())["points"]) == 1


def test_one_calibration_for_all(
    dense: Path, text: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from svdconvert.calibration import run as module

    real, runs = module.StatisticsRun, []

    def counted(*args: object, **kwargs: object) -> object:
        runs.append(kwargs["skip_blocks"])
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "StatisticsRun", counted)
    arguments = {"keep": [0.4, 0.6], "methods": ["whiten", "kfac"], "calibration": calibration, **MEASURED}
    sweep(dense, text, tmp_path / "sweep", work=tmp_path / "work", **arguments)
    assert len(runs) == 1
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"whiten", "kfac", "statistics-kfac-whiten"}
    monkeypatch.setattr(decomposer, "decompose", None)
    convert(
        dense, tmp_path / "out", keep=0.5, method="kfac", calibration=calibration, work=tmp_path / "work" / "kfac",
        device="cpu", check=False,
    )  # fmt: skip


def test_ranks_models_and_targets(dense: Path, text: Path, tmp_path: Path) -> None:
    arguments = {"rank": [8, 16], "targets": ["mlp.*"], **MEASURED}
    found = sweep(dense, text, tmp_path / "sweep", keep_models=True, **arguments)
    assert [point.setting.budget for point in found.points] == ["rank 16", "rank 8"]
    for point in found.points:
        folder = tmp_path / "sweep" / "models" / point.setting.folder
        assert evaluate(folder, text, window=48, device="cpu").perplexity == point.perplexity
        ranks = json.loads((folder / "config.json").read_text())["svd_ranks"]
        assert set(ranks.values()) == {point.setting.rank}
        assert len(ranks) == 6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"window": 32}, "another window"),
        ({"stride": 5}, "another stride"),
        ({"dtype": "float32"}, "another dtype"),
        ({"targets": ["mlp.*"]}, "another targets"),
    ],
)
def test_another_sweep_is_refused(
    change: dict[str, object], words: str, dense: Path, text: Path, tmp_path: Path
) -> None:
    sweep(dense, text, tmp_path / "sweep", keep=[0.5], **MEASURED)
    before = (tmp_path / "sweep" / "sweep.json").read_bytes()
    with pytest.raises(InputError, match=words):
        sweep(dense, text, tmp_path / "sweep", keep=[0.5], **{**MEASURED, **change})  # type: ignore[arg-type]
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == before


def test_another_model_text_or_calibration(dense: Path, text: Path, calibration: Calibration, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    sweep(dense, text, out, keep=[0.5], methods=["asvd"], calibration=calibration, **MEASURED)
    other = tmp_path / "other.txt"
    other.write_text(text.read_text() + "more")
    with pytest.raises(InputError, match="another text"):
        sweep(dense, other, out, keep=[0.5], **MEASURED)
    with pytest.raises(InputError, match=r"sweep\.json was measured with another"):
        sweep(write_checkpoint(tmp_path / "model", random_tensors(seed=5)), text, out, keep=[0.5], **MEASURED)
    fewer = Calibration(calibration.text, samples=20, length=48)
    with pytest.raises(InputError, match="another calibration"):
        sweep(dense, text, out, keep=[0.5], methods=["asvd"], calibration=fewer, **MEASURED)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("either --keep or --rank", []),
        ("either --keep or --rank", ["--keep", "0.5", "--rank", "8"]),
        ("not a list of numbers", ["--keep", "0.5;0.6"]),
        ("not a list of numbers", ["--rank", "8.5"]),
        ("must lie between 0 and 1", ["--keep", "0.5,1.5"]),
        ("leaves no rank at all", ["--keep", "0.5,0.001"]),
        ("is larger than", ["--rank", "8,1000"]),
        ("needs a text", ["--keep", "0.5", "--method", "svd", "--method", "kfac"]),
        ("--alpha has no effect on --method svd", ["--keep", "0.5", "--alpha", "0.3"]),
        ("has no effect on --method svd", ["--keep", "0.5", "--method", "svd", "--calib", "somewhere"]),
        ("--method nonsense is unknown; choose one of", ["--keep", "0.5", "--method", "nonsense"]),
        ("--window 1000 is not possible", ["--keep", "0.5", "--window", "1000"]),
    ],
)
def test_refusals(words: str, options: list[str], dense: Path, text: Path, run: Run, tmp_path: Path) -> None:
    """All before anything is computed or written."""
    out = tmp_path / "out"
    result = run("sweep", dense, "--text", text, "--device", "cpu", "--no-plot", "--out", out, *options)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err
    assert not out.exists()


def test_foreign_folder_and_missing_out(dense: Path, text: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("x")
    result = run("sweep", dense, "--text", text, "--keep", "0.5", "--no-plot", "--out", tmp_path / "theirs")
    assert (result.code, "files that svdconvert did not write" in result.err) == (2, True)
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]
    assert "--out is missing" in run("sweep", dense, "--text", text, "--keep", "0.5").err


def test_command(dense: Path, text: Path, run: Run, tmp_path: Path) -> None:
    """Picture included; the second run has nothing left to do."""
    pytest.importorskip("matplotlib")
    out = tmp_path / "sweep"
    command = ["sweep", dense, "--text", text, "--keep", "0.3,0.6", "--window", 48]
    command += ["--layout", "balanced", "--layout", "pivoted", "--device", "cpu", "--out", out]
    done = run(*command)
    assert done.code == 0, done.err
    for words in (
        "dense",
        "svd, uniform, balanced",
        "svd, uniform, pivoted",
        "30% kept",
        "60% kept",
        "best at 30% kept",
    ):
        assert words in done.out
    assert {path.name for path in out.iterdir()} == {"sweep.json", "sweep.md", "sweep.png"}
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    again = run(*command, "--json")
    assert "4 of 4 points were measured by an earlier run" in again.err
    assert len(json.loads(again.out)["points"]) == 4


def test_one_value_may_stand_alone(dense: Path, text: Path, tmp_path: Path) -> None:
    alone = sweep(dense, text, tmp_path / "alone", keep=0.5, methods="svd", layouts="pivoted", **MEASURED)
    listed = sweep(dense, text, tmp_path / "listed", keep=[0.5], methods=["svd"], layouts=["pivoted"], **MEASURED)
    assert [point.setting for point in alone.points] == [point.setting for point in listed.points]
    assert len(alone.points) == 1


def test_names() -> None:
    setting = Setting("asvd", (("alpha", 0.7),), "balanced", "uniform", keep=0.375)
    assert (setting.line, setting.budget) == ("asvd, uniform, balanced, alpha 0.7", "37.5% kept")
    assert setting.folder == "asvd-uniform-balanced-alpha0.7-keep0.375"
    assert Setting("asvd", (("alpha", 0.5),), "balanced", "uniform", rank=8).line == "asvd, uniform, balanced"

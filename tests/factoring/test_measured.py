"""The losses told after a conversion: the dense model's is measured once, and comes out the same either way."""

from __future__ import annotations

from pathlib import Path

import pytest

from svdconvert import Calibration, calibrate, convert
from svdconvert.factoring.measured import measure_losses
from svdconvert.jobs.record import read_record
from svdconvert.models.stream import Stream
from svdconvert.planning.events import Events
from svdconvert.settings.text import BATCH_SIZE
from svdconvert.storage.source import LocalSource


@pytest.mark.parametrize("method", ["kfac", "whiten"])
@pytest.mark.parametrize("collected", [False, True], ids=["text", "folder"])
def test_dense_loss_is_measured_once(
    dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, collected: bool
) -> None:
    calibration, run = Calibration(str(text), samples=6, length=24), []
    given: dict[str, object] = {"calibration": calibration}
    if collected:
        calibrate(dense, calibration, tmp_path / "stats", methods=[method], device="cpu")
        given = {"stats": tmp_path / "stats"}
    step = Stream.step
    monkeypatch.setattr(Stream, "step", lambda stream, *args: (run.append(stream._name), step(stream, *args)))
    convert(dense, tmp_path / "out", keep=0.6, method=method, device="cpu", **given)  # type: ignore[arg-type]
    assert set(run) == {"the compressed model"}
    told = read_record(tmp_path / "out").results
    source = LocalSource(dense)
    loss, same = measure_losses(
        source,
        calibration.tokens(source),
        lambda index: {},
        work=tmp_path / "work",
        device="cpu",
        batch_size=BATCH_SIZE,
        events=Events(),
    )
    assert told["dense_loss"] == loss.mean
    # Only a metric that is shrunk takes float32 products; those of a folder were made elsewhere.
    assert ("moments from float32" in told.get("arithmetic", "")) is (method == "kfac" and not collected)
    assert ("arithmetic" in told) is not collected
    assert same == loss


@pytest.mark.parametrize("first", ["calibration", "stats"])
def test_arithmetic_is_that_of_the_decompositions(first: str, dense: Path, text: Path, tmp_path: Path) -> None:
    """One work folder for a text and for its collected statistics: what is used again is told as it was made."""
    calibration = Calibration(str(text), samples=6, length=24)
    calibrate(dense, calibration, tmp_path / "stats", methods=["kfac"], device="cpu")
    given = {"calibration": calibration, "stats": tmp_path / "stats"}
    told, common = [], {"work": tmp_path / "work", "device": "cpu", "check": False}
    for number, name in enumerate((first, *(name for name in given if name != first), "none of both")):
        if name == "none of both":  # some of it anew
            next((tmp_path / "work" / "decompositions").glob("layers.1.*.safetensors")).unlink()
            name = "stats" if first == "calibration" else "calibration"
        convert(dense, tmp_path / str(number), keep=0.5 + number / 10, **common, **{name: given[name]})  # type: ignore[arg-type]
        told.append(read_record(tmp_path / str(number)).results.get("arithmetic", ""))
    assert told[0] == told[1]
    assert told[0].startswith("float32 passes by ") is (first == "calibration")
    assert told[2].endswith("others collected beforehand")

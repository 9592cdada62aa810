"""`--heal`: a conversion and the healing of its result as one job, to the bytes of both commands in turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import read_config, read_weights, tree
from support.families import write_family
from support.refusals import assert_refused

import svdconvert.healing.state
from svdconvert import Calibration, Events, convert, heal, report, verify
from svdconvert.jobs.own_files import JOB_FOLDER
from svdconvert.models.blocks import ModelBlocks
from svdconvert.planning.make import make_plan
from svdconvert.settings.conversion import Conversion
from svdconvert.storage.source import LocalSource


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "svdconvert.json").read_text())
    return found


def timeless(matrices: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {key: v for key, v in one.items() if key != "seconds"} for name, one in matrices.items()}


def test_one_command(run: Callable[..., SimpleNamespace], dense: Path, text: Path, tmp_path: Path) -> None:
    """One command makes what two make; what is known without training stands apart; all commands take it."""
    out = tmp_path / "out"
    words = [dense, "--keep", 0.6, "--calib", text, "--calib-samples", 8, "--calib-length", 32, "--layout", "pivoted"]
    done = run(*words, "--heal", "--heal-samples", 24, "--device", "cpu", "--report", "--out", out)
    assert done.code == 0, done.err
    assert "more of disk" in done.out
    assert "the conversion is done; healing it" in done.out
    assert "KL(dense || model)" in done.out
    calibration = Calibration(str(text), samples=8, length=32)
    converted = convert(dense, tmp_path / "one", keep=0.6, calibration=calibration, layout="pivoted", device="cpu")
    other = Calibration(str(text), samples=24, length=32)
    healed = heal(tmp_path / "one", dense, other, tmp_path / "two", device="cpu").record
    expected = read_weights(tmp_path / "two")
    found = read_weights(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert read_config(out) == read_config(tmp_path / "two")

    told, plain = record(out), converted.outcome.record
    assert told["healing"]["changed"], "else the comparison says little"
    assert told["healing"] == {name: value for name, value in healed["healing"].items() if name != "start"}
    assert told["matrices"] == healed["matrices"]
    free = told["training_free"]
    assert timeless(free["matrices"]) == timeless(plain["matrices"])
    assert {name: value for name, value in free.items() if name != "matrices"} == {
        name: plain[name] for name in ("predicted_loss", "dense_loss", "measured_loss")
    }
    assert not {"measured_loss", "predicted_loss"} & told.keys(), "of the factors as they were"
    assert told["params"] == plain["params"]
    assert told["repeat"].endswith("--heal --heal-samples 24 --out DIR")

    card = (out / "README.md").read_text()
    assert card.index("## Before healing") < card.index("by this conversion") < card.index("## Healed")
    assert f"| after | {told['healing']['after']['kl']:.4f} |" in card
    assert "brought KL(dense ‖ model) from" in (out / "report.html").read_text()
    assert "brought KL(dense ‖ model) from" in report(out, tmp_path / "page.html").read_text()
    assert [check for check in verify(out, dense) if not check.passed] == []
    assert not (out / JOB_FOLDER).exists()
    again = run(*words, "--heal", "--heal-samples", 24, "--device", "cpu", "--json", "--out", out)
    shown = json.loads(again.out)
    assert shown["already_done"]
    assert shown["healing"] == told["healing"]
    assert shown["losses"]["measured_loss"] == plain["measured_loss"]
    assert_refused(run(*words, "--device", "cpu", "--out", out), "heal")


class Killed(BaseException):
    pass


class Killer(Events):
    """Breaks off at one of the calls of a phase."""

    def __init__(self, phase: str, at: int) -> None:
        self.phase, self.left = phase, at

    def _call(self, phase: str) -> None:
        if phase == self.phase:
            self.left -= 1
            if not self.left:
                raise Killed

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        self._call(phase)

    def shard(self, name: str, size: int) -> None:
        self._call("wrote")


@pytest.mark.parametrize("heal_calib", [None, "self"])
def test_broken_off_in_every_stage(
    heal_calib: str | None, dense: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(svdconvert.healing.state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(svdconvert.healing.state, "SAVE_FACTOR", 0.0)
    calibration = Calibration(str(text), samples=24, length=32, batch_size=8)
    how: dict[str, Any] = {"rank": 12, "calibration": calibration, "device": "cpu", "heal": True, "heal_epochs": 0.1}
    how |= {"heal_calib": heal_calib, "heal_samples": None if heal_calib is None else 10}
    convert(dense, tmp_path / "whole", **how)
    expected = tree(tmp_path / "whole")
    stages = [("forward", 2), ("wrote", 1), ("dense model", 2), ("healing", 2), ("wrote", 2)]
    if heal_calib is not None:
        stages = [("writing text", 3)]
    for number, (phase, at) in enumerate(stages):
        out = tmp_path / str(number)
        with pytest.raises(Killed):
            convert(dense, out, **how, events=Killer(phase, at))
        assert [path.name for path in out.iterdir() if path.name != JOB_FOLDER] in ([], ["model.safetensors"]), phase
        convert(dense, out, **how)
        assert tree(out) == expected, (phase, at)


def test_the_work_that_is_kept_is_of_the_conversion(dense: Path, text: Path, tmp_path: Path) -> None:
    """As without healing, beside the result; and another run begins with it."""
    calibration = Calibration(str(text), samples=8, length=24)
    how: dict[str, Any] = {"rank": 12, "calibration": calibration, "device": "cpu", "check": False}
    convert(dense, tmp_path / "out", **how, keep_work=True, heal=True)
    assert (tmp_path / "out-work").is_dir()
    phases = set()

    class Heard(Events):
        def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
            phases.add(phase)

    convert(dense, tmp_path / "again", **how, work=tmp_path / "out-work", events=Heard())
    assert "forward" not in phases
    assert record(tmp_path / "again")["matrices"].keys() == record(tmp_path / "out")["matrices"].keys()


def test_refused(run: Callable[..., SimpleNamespace], dense: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words, calib = [dense, "--rank", 12, "--out", out], ["--calib", text, "--calib-length", 24]
    assert_refused(run(*words, *calib, "--heal-samples", 3), "--heal-samples 3 has no effect without --heal")
    assert_refused(run(*words, "--heal"), "--heal needs a text", "--heal-calib")
    assert_refused(run(*words, "--stats", tmp_path, "--heal"), "--heal needs a text itself", "--heal-calib")
    assert_refused(run(*words, *calib, "--heal", "--heal-epochs", 0), "--heal-epochs 0 must be above 0")
    assert_refused(run(*words, *calib, "--heal", "--heal-samples", 0), "--heal-samples", usage=True)
    assert_refused(
        run(*words, *calib, "--heal", "--heal-calib", text, "--method", "svd"),
        "--calib",
        "has no effect on --method svd",
    )
    assert not out.exists()


def test_too_little_room(
    dense: Path, text: Path, tmp_path: Path, run: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by the plan, and refused before anything is computed."""
    from svdconvert.healing import memory
    from svdconvert.storage import disk

    out = tmp_path / "out"
    words = [dense, "--rank", 12, "--calib", text, "--calib-length", 24, "--heal", "--device", "cpu"]
    plan = json.loads(run(*words, "--dry-run", "--json").out)
    needs, after = plan["healing"], plan["bytes"]["after"]
    assert needs["disk_bytes"] > after, "the model lies there as it was converted, too"
    assert "of memory, and meanwhile" in run(*words, "--dry-run").out
    assert "healing" not in json.loads(run(*words[:3], "--dry-run", "--json").out)
    with monkeypatch.context() as patch:
        patch.setattr(memory, "available_memory_bytes", lambda: needs["memory_bytes"] - 1)
        assert_refused(run(*words, "--out", out), "of memory")
    with monkeypatch.context() as patch:
        patch.setattr(disk, "free_bytes", lambda folder: needs["disk_bytes"] - 1)
        assert_refused(run(*words, "--out", out), "to heal what it converts", "leave out --heal")
    assert not out.exists()


def test_hidden_states_that_are_not_as_wide_as_the_embedding(text: Path, tmp_path: Path) -> None:
    """Of the tiny OPT, whose embedding is projected; what the plan counts is what the states take."""
    source = LocalSource(write_family(tmp_path / "opt", "opt"))
    blocks, how = ModelBlocks(source), {"calibration": Calibration(str(text), samples=4, length=16), "heal": True}
    assert blocks.width != blocks.hidden_size
    disk = []
    for samples in (40_000, 60_000):
        needs = make_plan(source, Conversion.of(rank=8, heal_samples=samples, **how)).healing
        assert needs is not None
        disk.append(needs.disk_bytes)
    # twice, for the dense model's and those between two blocks
    assert disk[1] - disk[0] == 2 * 20_000 * 16 * 4 * blocks.hidden_size

"""Healing by several processes: what one process gives but for rounding, and the same again after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_weights, tree
from support.forked import Forked
from support.launching import together
from support.packed import mixed, pack_folder

from svdconvert import Calibration, heal

# The variables that torchrun sets; and a process that dies as the state of its training is saved.
HOOKS = r"""
import os, signal
def begin(order):
    os.environ.update(order["environment"])
    from svdconvert.healing import state, training
    state.SAVE_SECONDS = state.SAVE_FACTOR = 0.0
    if order["dies"]:
        real, saved = training.Training._save, []
        def dying(self):
            saved.append(self.state.done)
            if len(saved) == order["dies"]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self)
        training.Training._save = dying
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    found = Forked(tmp_path_factory.mktemp("forked"), HOOKS)
    yield found
    found.close()


def words(model: Path, dense: Path, text: Path, *more: object) -> list[object]:
    read = ["--calib", text, "--calib-samples", 24, "--calib-length", 48, "--calib-batch-size", 5]
    how = ["--steps", 4, "--precision", "float32", "--device", "cpu", "--no-check"]
    return ["heal", model, "--against", dense, *read, *how, *more]


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "svdconvert.json").read_text())["healing"]
    return found


@pytest.mark.parametrize("batch", [5, 1])
def test_as_one_process(batch: int, forked: Forked, dense: Path, factored: Path, text: Path, tmp_path: Path) -> None:
    """Parts of unequal size; a step of one sequence leaves a process without any."""
    how = ["--batch-size", batch, "--lr", 2e-3, "--hints", 3]
    done = together(forked, 2, *words(factored, dense, text, *how, "--out", tmp_path / "two"))
    assert [ended.status for ended in done] == [0, 0], done
    assert done[1].out == ""
    assert "KL(dense || model)" in done[0].out
    calibration = Calibration(str(text), samples=24, length=48, batch_size=5)
    heal(
        *(factored, dense, calibration, tmp_path / "one"),
        steps=4,
        lr=2e-3,
        batch_size=batch,
        hints=3.0,
        precision="float32",
        device="cpu",
        check=False,
    )
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert one["changed"]
    assert one["tokens"] == two["tokens"]
    assert [check["kl"] for check in two["checks"]] == pytest.approx([check["kl"] for check in one["checks"]], rel=1e-4)
    assert [check["train_kl"] for check in two["checks"]] == pytest.approx(
        [check["train_kl"] for check in one["checks"]], rel=1e-4
    )
    assert two["after"]["kl"] == pytest.approx(one["after"]["kl"], rel=1e-4)
    start, expected = read_weights(factored), read_weights(tmp_path / "one")
    for name, tensor in read_weights(tmp_path / "two").items():
        moved = float((expected[name].double() - start[name].double()).norm())
        # directions of which the gradient has hardly more than rounding get steps of full length
        assert float((tensor.double() - expected[name].double()).norm()) <= 0.02 * moved, name
        assert (moved > 0) == name.endswith(("down.weight", "up.weight"))


def test_packed_as_one_process(forked: Forked, dense: Path, factored: Path, text: Path, tmp_path: Path) -> None:
    """Scales are trained in every process alike, and integers stay."""
    pack_folder(factored, tmp_path / "packed", mixed)
    line = words(tmp_path / "packed", dense, text, "--batch-size", 5, "--lr", 1e-3)
    done = together(forked, 2, *line, "--out", tmp_path / "two")
    assert [ended.status for ended in done] == [0, 0], done
    heal(
        *(tmp_path / "packed", dense, Calibration(str(text), samples=24, length=48, batch_size=5), tmp_path / "one"),
        steps=4,
        lr=1e-3,
        batch_size=5,
        precision="float32",
        device="cpu",
        check=False,
    )
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    assert one["changed"]
    assert two["after"]["kl"] == pytest.approx(one["after"]["kl"], rel=1e-4)
    start, expected, found = (read_weights(tmp_path / name) for name in ("packed", "one", "two"))
    assert found.keys() == start.keys()
    moved = [name for name in start if not torch.equal(found[name], start[name])]
    assert moved
    assert all(name.endswith(("weight_scale", "down.weight", "up.weight")) for name in moved)
    for name in moved:
        step = float((expected[name].double() - start[name].double()).norm())
        assert float((found[name].double() - expected[name].double()).norm()) <= 0.05 * step, name


def test_killed_and_continued(forked: Forked, dense: Path, factored: Path, text: Path, tmp_path: Path) -> None:
    """The leader or another one, in a trial or after them: the same bytes as of two that nobody disturbed."""
    line = words(factored, dense, text, "--batch-size", 3)
    assert [ended.status for ended in together(forked, 2, *line, "--out", tmp_path / "whole")] == [0, 0]
    expected = tree(tmp_path / "whole")
    for victim, dies in ((0, 3), (0, 18), (1, 2)):
        out = tmp_path / f"{victim}-{dies}"
        killed = together(forked, 2, *line, "--out", out, victim=victim, dies=dies)
        assert killed[0].status == -signal.SIGKILL, killed
        assert not (out / "config.json").exists()
        done = together(forked, 2, *line, "--out", out)
        assert [ended.status for ended in done] == [0, 0], done
        assert tree(out) == expected, (victim, dies)


def test_a_conversion_too(forked: Forked, dense: Path, text: Path, tmp_path: Path) -> None:
    """`--heal` in two processes; with a learning rate at which one of them has no finite numbers, both give up."""
    read = ["--calib", text, "--calib-samples", 12, "--calib-length", 32, "--heal", "--device", "cpu", "--no-check"]
    done = together(forked, 2, dense, "--rank", 12, *read, "--out", tmp_path / "out")
    assert [ended.status for ended in done] == [0, 0], done
    assert told(tmp_path / "out")["processes"] == 2
    assert not (tmp_path / "out" / ".svdconvert").exists()


def test_no_finite_numbers_in_one_of_them(dense: Path, factored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All processes hear of it, as none may wait for the sums of another one."""
    from svdconvert.healing import objective
    from svdconvert.machine.processes import Group
    from svdconvert.models.head_divergence import HeadDivergence

    class Other(Group):
        """Beside one that adds what is given."""

        size = 2

        def __init__(self, theirs: list[float]) -> None:
            self.theirs = torch.tensor(theirs, dtype=torch.float64)

        def add(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.add_(self.theirs)

    def fails() -> HeadDivergence:
        raise objective.Diverged

    for theirs, own in (([1.0, 0, 0, 0, 0], lambda: HeadDivergence(1.0, 2.0, 3.0, 4)), ([0.0, 1, 2, 3, 4], fails)):
        monkeypatch.setattr(objective.processes, "_current", Other(theirs))
        with pytest.raises(objective.Diverged):
            objective._of_all(own)
    monkeypatch.setattr(objective.processes, "_current", Other([0.0, 0.5, 1, 2, 3]))
    assert objective._of_all(lambda: HeadDivergence(1.0, 2.0, 3.0, 4)) == HeadDivergence(1.5, 3.0, 5.0, 7)

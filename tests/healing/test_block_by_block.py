"""Healing block by block: as a plain loop over both whole models trains, and found again after a kill."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.checkpoints import read_weights, tree
from support.refusals import assert_refused
from support.textbook_muon import muon_step
from torch import Tensor
from transformers import AutoModelForCausalLM

import svdconvert.healing.state
from svdconvert import Calibration, Events, InputError, convert, heal, verify
from svdconvert.healing import memory
from svdconvert.healing.sequences import Order, judges
from svdconvert.machine import processes
from svdconvert.machine.processes import Group
from svdconvert.storage.source import LocalSource

MADE: Mapping[str, Mapping[str, Any]] = {"balanced": {}, "split": {"split_fused": True, "layout": "pivoted"}}
STEPS, RATE, BATCH = 4, 2e-3, 3
SHORT: Mapping[str, Any] = {
    "how": "blocks",
    "steps": STEPS,
    "lr": RATE,
    "batch_size": BATCH,
    "precision": "float32",
    "device": "cpu",
}


def whole(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()
    return model.requires_grad_(False)


def outputs(model: Any, ids: Tensor, index: int) -> Tensor:
    """Of a block, [n, length, hidden]."""
    kept: list[Tensor] = []

    def keep(block: Any, inputs: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handle = model.gpt_neox.layers[index].register_forward_hook(keep)
    model(ids)
    handle.remove()
    return kept[0]


def error(teacher: Any, model: Any, ids: Tensor, index: int) -> Tensor:
    """Mean over the tokens of ||y - y'||^2 / ||y||^2 of a block's outputs."""
    with torch.no_grad():
        wanted = outputs(teacher, ids, index)
    return ((outputs(model, ids, index) - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


def train_block(teacher: Any, model: Any, ids: Tensor, held_out: Tensor, seed: int, index: int) -> tuple[float, float]:
    """Give a block its best factors; returns the held-out error before and after."""
    train = torch.tensor([i for i in range(len(ids)) if i not in held_out.tolist()])
    order = Order(train, BATCH, seed)
    place = f"gpt_neox.layers.{index}."
    factors = [
        parameter.requires_grad_()
        for name, parameter in model.named_parameters()
        if name.startswith(place) and name.endswith(("down.weight", "up.weight"))
    ]
    means = [torch.zeros_like(factor) for factor in factors]
    found = [(error(teacher, model, ids[held_out], index).item(), [factor.detach().clone() for factor in factors])]
    for step in range(STEPS):
        gradients = torch.autograd.grad(error(teacher, model, ids[order(step)], index), factors)
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        rate = RATE * (1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 1))))
        for i, (factor, gradient) in enumerate(zip(factors, gradients, strict=True)):
            g = gradient * min(1.0, 1.0 / norm)
            means[i], taken = muon_step(means[i], g, rate)
            factor.data -= taken
        found.append((error(teacher, model, ids[held_out], index).item(), [f.detach().clone() for f in factors]))
    best, values = min(found, key=lambda one: one[0])
    for factor, value in zip(factors, values, strict=True):
        factor.requires_grad_(False).copy_(value)
    return found[0][0], best


@pytest.mark.parametrize("kind", MADE)
def test_a_plain_loop_gives_the_same(kind: str, dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    start = tmp_path / "start"
    convert(dense, start, rank=12, dtype="float32", device="cpu", check=False, **MADE[kind])
    told = heal(start, dense, calibration, tmp_path / "out", **SHORT).record["healing"]
    tokens = calibration.tokens(LocalSource(dense))
    held_out, teacher, model = judges(tokens), whole(dense), whole(start)
    expected = [
        train_block(teacher, model, tokens.ids, held_out, calibration.seed, index)
        for index in range(len(told["blocks"]))
    ]
    assert len(expected) == len(model.gpt_neox.layers)
    assert [block["before"] for block in told["blocks"]] == pytest.approx([one for one, _ in expected], rel=1e-3)
    assert [block["after"] for block in told["blocks"]] == pytest.approx([one for _, one in expected], rel=1e-3)
    assert all(after < before for before, after in expected)
    assert told["changed"]
    assert told["after"]["kl"] < told["before"]["kl"]
    assert (told["steps"], told["lr"]) == (STEPS * len(expected), None)
    before, after, healed = read_weights(start), read_weights(tmp_path / "out"), dict(model.named_parameters())
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if not name.endswith(("down.weight", "up.weight")):
            assert torch.equal(tensor, before[name]), name
            continue
        moved = float((healed[name] - before[name]).norm())
        # Muon makes as long a step in directions of which the gradient has hardly more than errors of rounding
        assert float((tensor - healed[name]).norm()) < 0.03 * moved, name
    with torch.no_grad():
        p, q = (one(tokens.ids[held_out]).logits[:, :-1].log_softmax(-1) for one in (teacher, model))
    assert told["after"]["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert [check for check in verify(tmp_path / "out", dense) if not check.passed] == []
    assert "tokens; block by block." in (tmp_path / "out" / "README.md").read_text()


class Killed(BaseException):
    pass


class Killer(Events):
    """Breaks off at one of the calls of a phase."""

    def __init__(self, phase: str, at: int) -> None:
        self.phase, self.left = phase, at

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == self.phase:
            self.left -= 1
            if not self.left:
                raise Killed


def test_broken_off_and_continued(
    dense: Path, factored: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"how": "blocks", "steps": 2, "batch_size": 4, "device": "cpu", "check": False}
    heal(factored, dense, calibration, tmp_path / "whole", **how)
    expected = tree(tmp_path / "whole")
    # in trials, in the course that counts, of a later block (4 courses of 2 steps), between two, and at the end
    for phase, at in (("healing", 1), ("healing", 8), ("healing", 13), ("dense model", 2), ("judging", 2)):
        out = tmp_path / f"{phase}-{at}"
        monkeypatch.setattr(svdconvert.healing.state, "SAVE_SECONDS", 1e9 if at == 13 else 0.0)
        monkeypatch.setattr(svdconvert.healing.state, "SAVE_FACTOR", 0.0)
        with pytest.raises(Killed):
            heal(factored, dense, calibration, out, **how, events=Killer(phase, at))
        assert [path.name for path in out.iterdir()] == [".svdconvert"]
        heal(factored, dense, calibration, out, **how)
        assert tree(out) == expected, (phase, at)


def test_what_brings_no_gain_is_left_out(dense: Path, factored: Path, calibration: Calibration, tmp_path: Path) -> None:
    """At an absurd learning rate each block stays as it is, and so does the model."""
    told = heal(factored, dense, calibration, tmp_path / "out", **{**SHORT, "lr": 1e4}).record["healing"]
    assert not told["changed"]
    assert all(block["before"] == block["after"] for block in told["blocks"])
    start = read_weights(factored)
    assert all(torch.equal(tensor, start[name]) for name, tensor in read_weights(tmp_path / "out").items())


def test_refused(
    run: Callable[..., SimpleNamespace],
    dense: Path,
    factored: Path,
    text: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["--against", dense, "--calib", text, "--calib-length", 48, "--how", "blocks", "--device", "cpu"]
    convert(dense, tmp_path / "shared", rank=12, share_layers=2, device="cpu", check=False)
    shared = run("heal", tmp_path / "shared", *words, "--out", tmp_path / "out")
    assert_refused(shared, "--how blocks does not go with", "--how end-to-end")
    with pytest.raises(InputError, match="how='layers' is unknown"):
        heal(factored, dense, calibration, tmp_path / "out", how="layers")
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: 100)
    assert_refused(run("heal", factored, *words, "--out", tmp_path / "out"), "of memory")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()

    from svdconvert.healing import block_by_block

    two = Group()
    two.size = 2
    monkeypatch.setattr(processes, "_current", two)
    work: Any = SimpleNamespace(source=LocalSource(factored))
    with pytest.raises(InputError, match="one process"):
        block_by_block.refuse(work)

"""Healed folders: trained as a plain loop over both whole models trains, complete, and found again after a kill."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import read_config, read_weights, tree
from support.refusals import assert_refused
from support.textbook_muon import muon_step
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import svdconvert.healing.state
from svdconvert import Calibration, Events, InputError, convert, densify, evaluate, heal, report, verify
from svdconvert.healing.sequences import Order, judges
from svdconvert.storage.source import LocalSource

# How each layout comes about from the tiny dense model.
MADE: Mapping[str, Mapping[str, Any]] = {
    "balanced": {},
    "pivoted": {"layout": "pivoted"},
    "shared": {"share_layers": 2},
    "split": {"split_fused": True, "layout": "pivoted"},
}
SHORT: Mapping[str, Any] = {"steps": 4, "lr": 2e-3, "batch_size": 3, "precision": "float32", "device": "cpu"}


@pytest.fixture(scope="module", params=MADE)
def start(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model factored, stored in float32, with one kind of target left dense. Read only."""
    folder = tmp_path_factory.mktemp("start") / "model"
    targets = ["query_key_value", "attention.dense", "dense_h_to_4h"]
    convert(dense, folder, rank=12, targets=targets, dtype="float32", device="cpu", check=False, **MADE[request.param])
    return folder


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval()


def divergence(teacher: Any, model: Any, ids: Tensor) -> Tensor:
    """Mean KL(dense || model) of the predicted tokens."""
    with torch.no_grad():
        p = teacher(ids).logits[:, :-1].log_softmax(-1)
    q = model(ids).logits[:, :-1].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def behind(model: Any, ids: Tensor) -> list[Tensor]:
    """The outputs of the blocks at the depths that are compared: of three blocks all."""
    found = list[Tensor]()
    blocks = model.gpt_neox.layers
    assert len(blocks) == 3
    hooks = [
        block.register_forward_hook(
            lambda _, __, output: found.append(output[0] if isinstance(output, tuple) else output)
        )
        for block in blocks
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def distance(teacher: Any, model: Any, ids: Tensor) -> Tensor:
    """Mean ||y - y'||^2 / ||y||^2 over tokens and blocks."""
    with torch.no_grad():
        wanted = [output.bfloat16().double() for output in behind(teacher, ids)]
    pairs = zip(behind(model, ids), wanted, strict=True)
    return torch.stack([((y - x).square().sum(-1) / y.square().sum(-1)).mean() for x, y in pairs]).mean()


def trained(
    dense: Path, start: Path, ids: Tensor, held_out: Tensor, seed: int, hints: float
) -> tuple[dict[str, Tensor], list[float]]:
    """The factors after the steps of SHORT, in float64, and the held-out KL before and after them."""
    teacher, model = whole(dense), whole(start)
    model.requires_grad_(False)
    factors = {
        name: parameter.requires_grad_()
        for name, parameter in model.named_parameters()
        if name.endswith(("down.weight", "up.weight"))
    }
    train = torch.tensor([i for i in range(len(ids)) if i not in held_out.tolist()])
    order = Order(train, SHORT["batch_size"], seed)
    means = {name: torch.zeros_like(factor) for name, factor in factors.items()}
    kl = [divergence(teacher, model, ids[held_out]).item()]
    steps = SHORT["steps"]
    for step in range(steps):
        own = ids[order(step)]
        loss = divergence(teacher, model, own)
        if hints:
            loss = loss + hints * distance(teacher, model, own)
        gradients = torch.autograd.grad(loss, list(factors.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        # the first of four steps is the warm-up, at its end
        rate = SHORT["lr"] * (1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1))))
        for (name, factor), gradient in zip(factors.items(), gradients, strict=True):
            g = gradient * min(1.0, 1.0 / norm)
            means[name], taken = muon_step(means[name], g, rate)
            factor.data -= taken
    kl.append(divergence(teacher, model, ids[held_out]).item())
    return {name: factor.detach() for name, factor in factors.items()}, kl


@pytest.mark.parametrize("hints", [0.0, 10.0])
def test_a_plain_loop_gives_the_same(
    start: Path, dense: Path, calibration: Calibration, hints: float, tmp_path: Path
) -> None:
    outcome = heal(start, dense, calibration, tmp_path / "out", hints=hints, **SHORT)
    tokens = calibration.tokens(LocalSource(dense))
    held_out = judges(tokens)
    expected, kl = trained(dense, start, tokens.ids, held_out, calibration.seed, hints)
    told = outcome.record["healing"]
    assert told["changed"]
    assert (told["steps"], told["best_step"], told["lr"]) == (4, 4, SHORT["lr"])
    assert told["tokens"] == 4 * 3 * tokens.ids.shape[1]
    assert [told["before"]["kl"], told["after"]["kl"]] == pytest.approx(kl, rel=1e-3)
    before, after = read_weights(start), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if name not in expected:
            assert torch.equal(tensor, before[name]), name
            continue
        moved = float((expected[name] - before[name]).norm())
        # Adam makes as long a step where the gradient is hardly more than an error of rounding
        assert float((tensor - expected[name]).norm()) < 0.02 * moved, name
    assert read_config(tmp_path / "out") == read_config(start)


def test_a_healed_folder_is_complete(start: Path, dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """The files of a conversion, and every command takes it."""
    out = tmp_path / "out"
    heal(start, dense, calibration, out, **SHORT)
    assert {path.name for path in out.iterdir()} == {path.name for path in start.iterdir()}
    assert [check for check in verify(out, dense) if not check.passed] == []
    assert "KL(dense ‖ model)" in (out / "README.md").read_text()
    page = report(out).read_text()
    assert "brought KL(dense ‖ model) from" in page
    assert "model, healed" in page
    densify(out, tmp_path / "dense", device="cpu")
    ids = torch.arange(24)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(ids).logits
        expected = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)(ids).logits
    assert float((found - expected).abs().max()) < 1e-4
    # verify does see a factor that was changed
    weights = read_weights(out)
    name = next(name for name in weights if name.endswith("up.weight"))
    save_file(weights | {name: weights[name] * 1.1}, out / "model.safetensors", {"format": "pt"})
    assert {check.name for check in verify(out, dense) if not check.passed} == {"data", "factored matrices"}


class Killed(Exception):
    pass


class Killer(Events):
    """Breaks off at one of the steps of a phase."""

    def __init__(self, at: int, phase: str = "healing") -> None:
        self.left, self.phase = at, phase

    def progress(self, phase: str, done: int, total: int, detail: str = "") -> None:
        if phase == self.phase:
            self.left -= 1
            if not self.left:
                raise Killed


def test_broken_off_and_continued(
    dense: Path, factored: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the dense model, in trials, between two courses, and on the way: the same bytes, whatever was saved last."""
    how: dict[str, Any] = {"steps": 4, "batch_size": 4, "anchor": 2.0, "hints": 10.0, "precision": "bfloat16"}
    how["device"] = "cpu"
    heal(factored, dense, calibration, tmp_path / "whole", **how)
    expected = tree(tmp_path / "whole")
    assert expected
    # of 3 blocks, and of 3 trials and the course that counts, of 4 steps each
    for phase, at in (("dense model", 2), ("dense model", 4), *(("healing", step) for step in (1, 6, 8, 14))):
        out = tmp_path / f"{phase}-{at}"
        # where it is not saved, it begins again
        monkeypatch.setattr(svdconvert.healing.state, "SAVE_SECONDS", 1e9 if at == 6 else 0.0)
        monkeypatch.setattr(svdconvert.healing.state, "SAVE_FACTOR", 0.0)
        with pytest.raises(Killed):
            heal(factored, dense, calibration, out, **how, events=Killer(at, phase))
        assert not (out / "config.json").exists()
        assert (out / ".svdconvert" / "work" / "heal").is_dir()
        heal(factored, dense, calibration, out, **how)
        assert tree(out) == expected, (phase, at)


def test_an_absurd_learning_rate_changes_nothing(
    dense: Path, factored: Path, calibration: Calibration, tmp_path: Path
) -> None:
    notes: list[str] = []

    class Heard(Events):
        def note(self, text: str) -> None:
            notes.append(text)

    outcome = heal(factored, dense, calibration, tmp_path / "out", **{**SHORT, "lr": 1e4, "steps": 30}, events=Heard())
    told = outcome.record["healing"]
    assert not told["changed"]
    assert told["best_step"] == 0
    assert told["steps"] < 30, "given up early"
    assert told["before"] == told["after"]
    weights = read_weights(tmp_path / "out")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(factored).items())
    assert any("kept as they were" in note for note in notes)
    assert "no gain" in (tmp_path / "out" / "README.md").read_text()


def test_half_types_stay(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """What is stored in bfloat16 is so again, and what is told is what the stored numbers give."""
    convert(dense, tmp_path / "start", rank=12, dtype="bfloat16", layout="pivoted", device="cpu", check=False)
    outcome = heal(tmp_path / "start", dense, calibration, tmp_path / "out", **SHORT)
    before, after = read_weights(tmp_path / "start"), read_weights(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: t.dtype for name, t in before.items()}
    tokens = calibration.tokens(LocalSource(dense))
    teacher, model = whole(dense), whole(tmp_path / "out")
    with torch.no_grad():
        kl = float(divergence(teacher, model, tokens.ids[judges(tokens)]))
    assert outcome.record["healing"]["changed"]
    assert outcome.record["healing"]["after"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_the_head_of_the_dense_model_counts(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Where the compressed model's head was rounded to another type, the dense one's own makes the predictions."""
    convert(dense, tmp_path / "start", rank=12, dtype="bfloat16", device="cpu", check=False)
    assert not torch.equal(
        read_weights(tmp_path / "start")["lm_head.weight"].float(), read_weights(dense)["embed_out.weight"].float()
    )
    outcome = heal(tmp_path / "start", dense, calibration, tmp_path / "out", **SHORT)
    tokens = calibration.tokens(LocalSource(dense))
    teacher, model = whole(dense), whole(tmp_path / "start")
    with torch.no_grad():
        kl = float(divergence(teacher, model, tokens.ids[judges(tokens)]))
    assert outcome.record["healing"]["before"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_command(run: Callable[..., SimpleNamespace], dense: Path, factored: Path, text: Path, tmp_path: Path) -> None:
    """The program, with a choice of learning rates; a second run finds the result."""
    out = tmp_path / "out"
    words = ["heal", factored, "--against", dense, "--calib", text, "--calib-samples", 24, "--calib-length", 48]
    words += ["--steps", 12, "--batch-size", 4, "--device", "cpu", "--out", out]
    first = run(*words)
    assert first.code == 0, first.err
    assert "KL(dense || model)" in first.out
    told = svdconvert_record(out)
    rates = [trial["lr"] for trial in told["healing"]["trials"]]
    assert rates[:2] == [1e-4, 3e-4]
    gains = {trial["lr"]: told["healing"]["before"]["kl"] - trial["kl"] for trial in told["healing"]["trials"]}
    assert min(gains.values()) > 0
    assert rates[2:] == [1e-3 if gains[3e-4] >= 0.9 * gains[1e-4] else 3e-5]
    assert told["healing"]["lr"] == max(rate for rate, gain in gains.items() if gain >= 0.9 * max(gains.values()))
    assert told["repeat"].startswith("svdconvert heal DIR --against MODEL --calib TEXT --calib-samples 24")
    start = svdconvert_record(factored)["repeat"]
    assert told["healing"]["start"] == start
    assert f"{start}\n{told['repeat']}\n" in (out / "README.md").read_text()
    assert not (out / ".svdconvert").exists()
    again = run(*words)
    assert again.code == 0
    assert "already holds this result" in again.out
    other = run(*words[:-4], "--anchor", 1, "--device", "cpu", "--out", out)
    assert_refused(other, "anchor")
    shown = run("evaluate", out, "--text", text, "--against", dense, "--window", 32, "--device", "cpu")
    assert shown.code == 0, shown.err


def test_a_model_that_was_healed_before_has_all_its_commands(tmp_path: Path) -> None:
    from svdconvert.commands.heal import _start_command

    source: Any = SimpleNamespace(folder=tmp_path)
    assert _start_command(source) is None
    for record, expected in (
        ({}, None),
        ({"repeat": "svdconvert one", "healing": None}, "svdconvert one"),
        ({"repeat": "svdconvert heal", "healing": {"start": "svdconvert one"}}, "svdconvert one && svdconvert heal"),
    ):
        (tmp_path / "svdconvert.json").write_text(json.dumps(record))
        assert _start_command(source) == expected


def svdconvert_record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "svdconvert.json").read_text())
    return found


def test_text_of_the_dense_model(dense: Path, factored: Path, tmp_path: Path) -> None:
    """No corpus: the dense model writes what it is healed on, and the card's command says so."""
    written = Calibration("self", samples=8, length=16)
    told = heal(factored, dense, written, tmp_path / "out", **{**SHORT, "steps": 2}).record
    assert told["settings"]["samples"] == 8
    assert "--calib self" in told["repeat"]
    assert told["healing"]["held_out_tokens"] == 15
    assert not (tmp_path / "out" / ".svdconvert").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 0.0}, "lr"),
        ({"epochs": -1}, "epochs"),
        ({"anchor": -1.0}, "anchor"),
        ({"hints": -1.0}, "hints"),
        ({"how": "blocks", "hints": 3.0}, "hints"),
        ({"steps": 0}, "steps"),
        ({"steps": 4, "epochs": 1.0}, "give one of them"),
        ({"precision": "float16"}, "precision"),
    ],
)
def test_refused_numbers(
    changes: dict[str, Any], said: str, dense: Path, factored: Path, calibration: Calibration, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        heal(factored, dense, calibration, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_refused_models(
    run: Callable[..., SimpleNamespace],
    dense: Path,
    factored: Path,
    text: Path,
    fresh: Callable[..., Path],
    tmp_path: Path,
) -> None:
    words = ["--calib", text, "--calib-length", 48, "--out", tmp_path / "out"]
    assert_refused(run("heal", dense, "--against", dense, *words), dense, "not")
    assert_refused(run("heal", factored, "--against", factored, *words), "already factored")
    assert_refused(run("heal", factored, "--against", dense, "--out", tmp_path / "out"), "--calib is missing")
    assert_refused(run("heal", factored, "--against", dense, *words[:-1], factored), "own folder")
    assert_refused(
        run("heal", factored, "--against", dense, *words[:2], "--calib-samples", 1, *words[2:]), "at least 2"
    )
    smaller = fresh(config={"num_hidden_layers": 2})
    assert_refused(run("heal", factored, "--against", smaller, *words))
    assert not (tmp_path / "out" / "config.json").exists()
    with pytest.raises(InputError, match="Calibration"):
        heal(factored, dense, str(text), tmp_path / "out")  # type: ignore[arg-type]


class Noted(Events):
    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_another_dense_model_is_told(dense: Path, factored: Path, calibration: Calibration, tmp_path: Path) -> None:
    """A teacher may be another model on purpose; the one that the factors were made from is no news."""
    other = shutil.copytree(dense, tmp_path / "other")
    weights = read_weights(other)
    name = next(name for name in weights if name.endswith("dense_4h_to_h.weight"))
    save_file(weights | {name: -weights[name]}, other / "model.safetensors", {"format": "pt"})
    for number, teacher in enumerate((dense, other)):
        notes: list[str] = []
        heal(factored, teacher, calibration, tmp_path / f"out{number}", **SHORT, events=Noted(notes))
        assert any("made from other weight files than those of" in note for note in notes) == (teacher == other)
        # and so is the healed model's
        notes.clear()
        again = tmp_path / f"again{number}"
        heal(tmp_path / f"out{number}", dense, calibration, again, **SHORT, events=Noted(notes))
        assert any("made from other weight files than those of" in note for note in notes) == (teacher == other)


def test_what_is_not_trained_is_copied(tmp_path: Path) -> None:
    """The tensors that a step gets lie in a buffer, which is filled anew before what it gives is written."""
    from svdconvert.factoring.operations import OPERATIONS
    from svdconvert.linalg.panels import Workspace
    from svdconvert.planning.steps import Step
    from svdconvert.storage.tensor_files import write_tensors
    from svdconvert.tensors import TensorInfo

    infos = (TensorInfo("down", "F32", (2, 3)), TensorInfo("position", "I64", (5,)))
    write_tensors(tmp_path / "file", {"down": torch.full((2, 3), 7.0)})
    buffers = [torch.zeros(2, 3), torch.arange(5)]
    step = Step("healed", "w", infos, infos, {"file": str(tmp_path / "file"), "factors": ["down"]})
    (down, position), _ = OPERATIONS["healed"](buffers, step, Workspace())
    for buffer in buffers:
        buffer.fill_(-1)
    assert bool((down == 7).all())
    assert torch.equal(position, torch.arange(5))


def test_nothing_is_trained_before_the_last_depth(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Only the last of eleven blocks is factored: no hidden state that is compared changes, nor does the result."""
    config = AutoConfig.from_pretrained(dense, num_hidden_layers=11, hidden_size=16, intermediate_size=32)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path / "deep")
    for path in dense.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "deep")
    how: dict[str, Any] = {"device": "cpu", "check": False}
    convert(tmp_path / "deep", tmp_path / "start", rank=4, targets=["layers.10.*"], **how)
    for hints in (10.0, 0.0):
        out = tmp_path / f"hints{hints:.0f}"
        heal(tmp_path / "start", tmp_path / "deep", calibration, out, **(SHORT | how), hints=hints)
    told = svdconvert_record(tmp_path / "hints10")["healing"]
    assert (told["changed"], told["hints"]) == (True, 10.0)
    without, weights = read_weights(tmp_path / "hints0"), read_weights(tmp_path / "hints10")
    assert all(torch.equal(tensor, without[name]) for name, tensor in weights.items())


def test_trials_go_to_the_better_side() -> None:
    from svdconvert.healing.schedule import next_rate

    assert [next_rate({}, 1.0), next_rate({1e-4: 0.5}, 1.0)] == [1e-4, 3e-4]
    assert next_rate({1e-4: 0.5, 3e-4: 0.4}, 1.0) == 1e-3
    assert next_rate({1e-4: 0.5, 3e-4: 0.54}, 1.0) == 1e-3
    assert next_rate({1e-4: 0.5, 3e-4: 0.56}, 1.0) == 3e-5
    assert next_rate({1e-4: 0.5, 3e-4: math.inf}, 1.0) == 3e-5
    assert next_rate({1e-4: math.inf, 3e-4: math.inf}, 1.0) == 3e-5
    assert next_rate({1e-4: 0.5, 3e-4: 0.6, 3e-5: 0.4}, 1.0) is None
    assert next_rate({1e-4: 0.5, 3e-4: 0.4, 1e-3: 0.6}, 1.0) is None


def test_of_trials_that_gain_nearly_as_much_the_highest_rate_is_taken() -> None:
    from svdconvert.healing.schedule import best_rate

    assert best_rate({1e-4: 0.531, 3e-4: 0.706, 3e-5: 0.521}, 0.680) == 1e-4
    assert best_rate({1e-4: 0.55, 3e-4: 0.706, 3e-5: 0.521}, 0.680) == 3e-5
    assert best_rate({1e-4: 1.1, 3e-4: 1.3, 3e-5: 1.05}, 1.0) == 3e-5, "none gains: the one of the least loss"
    assert best_rate({1e-4: 1.0, 3e-4: math.inf, 3e-5: 1.0}, 1.0) == 3e-5
    assert best_rate({1e-4: math.inf, 3e-4: math.inf, 3e-5: math.inf}, 1.0) is None


def test_the_bundled_model_gains_or_is_left_alone(tmp_path: Path) -> None:
    """A trained model at 60 %, on a text that it was not healed on."""
    example = Path(__file__).parents[2] / "examples" / "tiny_polyglot"
    text = Calibration(str(example / "calibration.txt"), samples=24, length=128)
    convert(example / "model", tmp_path / "start", keep=0.6, calibration=text, device="cpu", check=False)
    how: dict[str, Any] = {"steps": 6, "lr": 1e-4, "batch_size": 4, "precision": "float32", "device": "cpu"}
    told = heal(tmp_path / "start", example / "model", text, tmp_path / "out", **how).record["healing"]
    assert told["after"]["kl"] <= told["before"]["kl"]
    part = tmp_path / "part.txt"
    part.write_text((example / "heldout.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    before, after = (
        evaluate(tmp_path / name, part, against=example / "model", device="cpu").divergence for name in ("start", "out")
    )
    assert before is not None
    assert after is not None
    if told["changed"]:
        assert after.kl < before.kl
    else:
        assert after == before


def test_too_little_memory(
    dense: Path, factored: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is run: 4 bytes of each weight, 8 and three copies of each factor."""
    from svdconvert.healing import memory

    weights = read_weights(factored)
    factors = [tensor for name, tensor in weights.items() if name.endswith(("down.weight", "up.weight"))]
    needed = sum(4 * t.numel() for t in weights.values()) + sum((8 + 3 * t.itemsize) * t.numel() for t in factors)
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match="of memory"):
        heal(factored, dense, calibration, tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: needed)
    memory.check_memory(needed, "", "cpu")


def test_order_goes_through_all_sequences() -> None:
    numbers = torch.tensor([2, 3, 5, 7, 11])
    order = Order(numbers, 2, seed=1)
    seen = torch.cat([order(step) for step in range(10)])
    for part in seen.split(5):
        assert torch.equal(part.sort().values, numbers)
    assert len({tuple(part.tolist()) for part in seen.split(5)}) > 1, "shuffled anew"
    assert not torch.equal(seen, torch.cat([Order(numbers, 2, seed=2)(step) for step in range(10)]))
    assert torch.equal(Order(numbers, 7, seed=1)(0)[:5], order_of_one(numbers))


def order_of_one(numbers: Tensor) -> Tensor:
    return torch.cat([Order(numbers, 1, seed=1)(step) for step in range(5)])

"""Healing of packed results: scales trained as a plain loop in float64 trains them, integers as they were."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.checkpoints import read_config, read_weights, tree
from support.packed import as_floats, mixed, pack_folder
from support.refusals import assert_refused
from support.textbook_muon import muon_step
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import svdconvert.healing.state
from svdconvert import Calibration, Events, InputError, convert, densify, evaluate, heal, report, verify
from svdconvert.grids import Grid
from svdconvert.healing import memory
from svdconvert.healing.grid_weights import RELATIVE, put_on_grid, take_off_grid
from svdconvert.healing.sequences import Order, judges
from svdconvert.healing.trained import trained_tensors
from svdconvert.linalg.integers import nearest
from svdconvert.planning.healing_needs import training_bytes
from svdconvert.planning.text_memory import TEXT_BASE_BYTES
from svdconvert.storage.source import LocalSource

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny_polyglot"
SHORT: Mapping[str, Any] = {"steps": 4, "lr": 1e-3, "batch_size": 3, "precision": "float32", "device": "cpu"}
PARTS = ("weight_packed", "weight_scale", "weight_shape")


def some(name: str, shape: tuple[int, ...]) -> Grid | None:
    """As ``mixed``, but for the up-side factors of the last layer, which stay in their floating type."""
    return None if ".layers.2." in name and name.endswith("up.weight") else mixed(name, shape)


@pytest.fixture(scope="module", params=["balanced", "pivoted", "shared"])
def start(request: pytest.FixtureRequest, dense: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A packed result, with a dense matrix that is packed and factors that are not; and its values. Read only."""
    place = tmp_path_factory.mktemp("packed")
    how: dict[str, Any] = {"share_layers": 2} if request.param == "shared" else {"layout": request.param}
    targets = ["attention.query_key_value", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
    convert(dense, place / "plain", rank=16, targets=targets, dtype="float32", device="cpu", check=False, **how)
    values = pack_folder(place / "plain", place / "packed", some)
    return SimpleNamespace(packed=place / "packed", floats=as_floats(place / "packed", values, place / "floats"))


def whole(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).double().eval().requires_grad_(False)


def divergence(teacher: Any, logits: Tensor, ids: Tensor) -> Tensor:
    """Mean KL(dense || model) of the predicted tokens."""
    p, q = teacher(ids).logits[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


def integers(tensors: Mapping[str, Tensor], stem: str, values: Tensor) -> Tensor:
    """The integers of a packed weight, read bit by bit: lowest first, 2^(b-1) added to each."""
    words, columns = tensors[f"{stem}.weight_packed"].numpy(), values.shape[1]
    grid = some(f"{stem}.weight", tuple(values.shape))
    assert grid is not None
    bits = grid.bits
    digits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    places = digits.reshape(len(words), columns, bits).astype(np.int64)
    codes = torch.from_numpy((places << np.arange(bits)).sum(axis=2) - 2 ** (bits - 1))
    scales = tensors[f"{stem}.weight_scale"].double()
    assert torch.allclose(product(codes, scales), values.double(), rtol=1e-6)
    return codes


def product(codes: Tensor, scales: Tensor) -> Tensor:
    return codes * scales.repeat_interleave(codes.shape[1] // scales.shape[1], dim=1)


def trained(
    dense: Path, start: SimpleNamespace, ids: Tensor, held_out: Tensor, seed: int
) -> tuple[dict[str, Tensor], list[float]]:
    """Scales and factors after the steps of SHORT, by autograd in float64; and the held-out KL before and after."""
    teacher, model, tensors = whole(dense), whole(start.floats), read_weights(start.packed)
    plain = dict(model.named_parameters())
    stems = [name.removesuffix(".weight_packed") for name in tensors if name.endswith(".weight_packed")]
    codes = {stem: integers(tensors, stem, plain[f"{stem}.weight"].float()) for stem in stems}
    begin = {f"{stem}.weight_scale": tensors[f"{stem}.weight_scale"].double() for stem in stems}
    free = {
        name: plain[name].clone() for name in tensors if name in plain and name.endswith(("down.weight", "up.weight"))
    } | {name: torch.zeros_like(scales) for name, scales in begin.items()}
    assert len(free) > len(begin) > 0

    def values() -> dict[str, Tensor]:
        return {name: begin[name] * (1 + RELATIVE * t) if name in begin else t for name, t in free.items()}

    def kl(sequences: Tensor) -> Tensor:
        now = values()
        weights = {name: tensor for name, tensor in now.items() if name not in begin}
        weights |= {f"{stem}.weight": product(codes[stem], now[f"{stem}.weight_scale"]) for stem in stems}
        return divergence(teacher, functional_call(model, weights, (ids[sequences],)).logits, ids[sequences])

    train = torch.tensor([i for i in range(len(ids)) if i not in held_out.tolist()])
    order, steps = Order(train, SHORT["batch_size"], seed), SHORT["steps"]
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in free.items()}
    found = [kl(held_out).item()]
    for step in range(steps):
        for t in free.values():
            t.requires_grad_()
        gradients = torch.autograd.grad(kl(order(step)), list(free.values()))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        # the first of four steps is the warm-up, at its end
        rate = SHORT["lr"] * (1.0 if step == 0 else 0.5 * (1 + math.cos(math.pi * (step - 1) / (steps - 1))))
        for (name, t), gradient in zip(free.items(), gradients, strict=True):
            g = gradient * min(1.0, 1.0 / norm)
            first, second = moments[name]
            if name not in begin:
                mean, taken = muon_step(first, g, rate)
                first.copy_(mean)
                free[name] = t.detach() - taken
                continue
            first.mul_(0.9).add_(g, alpha=0.1)
            second.mul_(0.95).add_(g * g, alpha=0.05)
            m, v = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.95 ** (step + 1))
            free[name] = t.detach() - rate * m / (v.sqrt() + 1e-8)
    with torch.no_grad():
        found.append(kl(held_out).item())
    return values(), found


def test_a_plain_loop_gives_the_same(
    start: SimpleNamespace, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    outcome = heal(start.packed, dense, calibration, tmp_path / "out", **SHORT)
    tokens = calibration.tokens(LocalSource(dense))
    expected, kl = trained(dense, start, tokens.ids, judges(tokens), calibration.seed)
    told = outcome.record["healing"]
    assert told["changed"]
    assert [told["before"]["kl"], told["after"]["kl"]] == pytest.approx(kl, rel=1e-3)
    before, after = read_weights(start.packed), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    counts = {"factors": 0, "scales": 0}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        if name not in expected:
            assert torch.equal(tensor, before[name]), name  # integers and shapes among them
            continue
        counts["scales" if name.endswith("scale") else "factors"] += tensor.numel()
        moved = float((expected[name] - before[name]).norm())
        # Adam makes as long a step where the gradient is hardly more than an error of rounding
        assert float((tensor - expected[name]).norm()) < 0.02 * moved, name
    assert told["trained"] == counts
    assert min(counts.values()) > 0
    assert read_config(tmp_path / "out") == read_config(start.packed)


def test_every_command_takes_it(start: SimpleNamespace, dense: Path, text: Path, tmp_path: Path) -> None:
    """Told as healed scales by record, card and page; the same predictions by every way to load it."""
    out = tmp_path / "out"
    record = heal(start.packed, dense, Calibration(str(text), samples=24, length=48), out, **SHORT).record
    checks = {check.name: check for check in verify(out, dense)}
    assert [check for check in checks.values() if not check.passed] == []
    assert checks["factored matrices"].detail.endswith("as recorded")
    assert checks["rounded matrices"].detail.startswith("1 rounded")
    assert checks["rounded matrices"].detail.endswith("as recorded")
    assert record["rounded"].keys() == {"layers.0.attention.dense"}
    assert record["rounded"]["layers.0.attention.dense"]["bits"] == [8]
    assert record["matrices"]["layers.2.mlp.dense_h_to_4h"]["bits"] == [6, 32]
    assert record["params"] == sum(
        tensor.numel() for tensor in read_weights(start.floats).values() if tensor.dtype != torch.int64
    )
    card = (out / "README.md").read_text()
    assert "with its factors and scales trained to" in card
    assert "the scales alone were trained" in card
    assert "compressed-tensors" in card
    assert "brought KL(dense ‖ model) from" in report(out).read_text()
    densify(out, tmp_path / "dense", device="cpu")
    ours, theirs = (evaluate(folder, text, device="cpu").perplexity for folder in (out, tmp_path / "dense"))
    assert ours == pytest.approx(theirs, rel=1e-4)


def test_stock_transformers_compute_the_same(
    start: SimpleNamespace, dense: Path, calibration: Calibration, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors")
    from support.tiny_factored import VERSION

    from svdconvert.models.loading import load_model

    if VERSION < (4, 57):
        pytest.skip("compressed-tensors 0.18 needs a newer transformers")
    heal(start.packed, dense, calibration, tmp_path / "out", **SHORT)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)(ids).logits
        expected = load_model(tmp_path / "out", "cpu", torch.float32)(ids).logits
        before = load_model(start.packed, "cpu", torch.float32)(ids).logits
    assert float((found - expected).abs().max()) < 1e-5 < float((found - before).abs().max())


def test_gradients_of_scales() -> None:
    """As autograd has them in float64; what is trained gives the scales back exactly; integers take a byte each."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(24, 6)
    for group, dtype in ((8, torch.bfloat16), (0, torch.float16)):
        rounded = nearest(torch.randn(6, 24, generator=generator), Grid(4, group), dtype)
        grid, moved = put_on_grid(layer, "weight", rounded)
        assert torch.equal(layer.weight, rounded.values(torch.float32))
        assert moved.shape == rounded.scales.shape
        assert grid.codes.dtype == torch.int8
        inputs, cotangent = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (24, 6))
        reference = moved.detach().double().requires_grad_()
        scales = rounded.scales.double() * (1 + RELATIVE * reference)
        ((inputs @ product(rounded.codes.double(), scales).T) * cotangent).sum().backward()
        (layer(inputs.float()) * cotangent.float()).sum().backward()
        assert moved.grad is not None
        assert reference.grad is not None
        assert float((moved.grad - reference.grad).norm()) < 1e-5 * float(reference.grad.norm())
        others = (rounded.scales.float() * (1 + 0.1 * torch.rand(rounded.scales.shape, generator=generator))).to(dtype)
        assert torch.equal(grid.scales(grid.moved(others)), others.float())
        moved.grad = None
        take_off_grid(layer, "weight")
        assert type(layer) is nn.Linear
        layer.weight = nn.Parameter(torch.zeros(6, 24))  # as whoever reads a block's weights puts them back


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


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed result in half types. Read only."""
    place = tmp_path_factory.mktemp("half")
    convert(dense, place / "plain", rank=12, device="cpu", check=False)
    pack_folder(place / "plain", place / "packed", some)
    return place / "packed"


@pytest.mark.parametrize("how", ["end-to-end", "blocks"])
def test_broken_off_and_continued(
    how: str,
    dense: Path,
    packed: Path,
    calibration: Calibration,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same bytes, and sizes, integers and types as before; with an anchor, and in bfloat16."""
    words: dict[str, Any] = {"how": how, "steps": 2, "batch_size": 4, "anchor": 2.0, "precision": "bfloat16"}
    words |= {"device": "cpu", "check": False}
    told = heal(packed, dense, calibration, tmp_path / "whole", **words).record["healing"]
    assert told["changed"]
    assert told["after"]["kl"] < told["before"]["kl"]
    expected, before = tree(tmp_path / "whole"), read_weights(packed)
    for name, tensor in read_weights(tmp_path / "whole").items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name]) or name.endswith(("weight_scale", "up.weight")), name
    monkeypatch.setattr(svdconvert.healing.state, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(svdconvert.healing.state, "SAVE_FACTOR", 0.0)
    for phase, at in (("healing", 1), ("healing", 8), ("judging", 2)):
        out = tmp_path / f"{phase}-{at}"
        with pytest.raises(Killed):
            heal(packed, dense, calibration, out, **words, events=Killer(phase, at))
        heal(packed, dense, calibration, out, **words)
        assert tree(out) == expected, (phase, at)


def test_no_change_is_a_candidate(dense: Path, packed: Path, calibration: Calibration, tmp_path: Path) -> None:
    told = heal(packed, dense, calibration, tmp_path / "out", **{**SHORT, "lr": 1e3}).record["healing"]
    assert not told["changed"]
    weights = read_weights(packed)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in read_weights(tmp_path / "out").items())


def test_too_little_memory(
    dense: Path, packed: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many bytes as loading takes: 4 of each weight, packed ones multiplied out; training takes less here."""
    needed = 4 * sum(info.size for info in LocalSource(packed).tensors.values())
    monkeypatch.setattr(memory, "available_memory_bytes", lambda: needed - 1)
    with pytest.raises(InputError, match="of memory"):
        heal(packed, dense, calibration, tmp_path / "out", **SHORT)
    assert not (tmp_path / "out").exists()


def test_bytes_and_heal_in_one_command(run: Callable[..., SimpleNamespace], tmp_path: Path) -> None:
    """What two commands make one makes; of the bundled model, on a text that it was not healed on."""
    model, text = EXAMPLE / "model", EXAMPLE / "calibration.txt"
    read = ["--calib", text, "--calib-samples", 8, "--calib-length", 32, "--targets", "layers.0.*", "--device", "cpu"]
    words, out = [model, "--bytes", 0.18, *read, "--work", tmp_path / "work"], tmp_path / "out"
    done = run(*words, "--heal", "--heal-samples", 64, "--report", "--out", out)
    assert done.code == 0, done.err
    assert run(*words, "--out", tmp_path / "one").code == 0
    other = Calibration(str(text), samples=64, length=32)
    healed = heal(tmp_path / "one", model, other, tmp_path / "two", device="cpu").record
    found, expected, before = (read_weights(folder) for folder in (out, tmp_path / "two", tmp_path / "one"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    changed = {name for name, tensor in found.items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(name.endswith("weight_scale") for name in changed)
    told, plain = (json.loads((folder / "svdconvert.json").read_text()) for folder in (out, tmp_path / "one"))
    assert told["healing"]["changed"]
    assert told["healing"]["after"]["kl"] < told["healing"]["before"]["kl"]
    assert told["rounded"] == healed["rounded"]
    assert told["training_free"]["rounded"].keys() == plain["rounded"].keys() == told["rounded"].keys()
    assert told["training_free"]["predicted_loss"] == plain["predicted_loss"]
    assert told["bytes"] == plain["bytes"]
    assert [check for check in verify(out, model) if not check.passed] == []
    card = (out / "README.md").read_text()
    assert card.index("## Before healing") < card.index("## Healed") < card.index("the scales alone were trained")
    again = run(*words, "--heal", "--heal-samples", 64, "--report", "--json", "--out", out)
    shown, source = json.loads(again.out), LocalSource(out)
    assert shown["already_done"]
    counted = training_bytes(source.tensors.values(), trained_tensors(source), source.packed)
    assert shown["plan"]["healing"]["memory_bytes"] == TEXT_BASE_BYTES + counted, "as planned from shapes"
    part = tmp_path / "part.txt"
    part.write_text((EXAMPLE / "heldout.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8")
    kls = [evaluate(folder, part, against=model, device="cpu").divergence for folder in (tmp_path / "one", out)]
    assert kls[0] is not None
    assert kls[1] is not None
    assert kls[1].kl < kls[0].kl


def test_what_does_not_go_with_it(run: Callable[..., SimpleNamespace], dense: Path, text: Path, tmp_path: Path) -> None:
    words = [dense, "--bytes", 0.5, "--calib", text, "--heal", "--out", tmp_path / "out"]
    for more in (["--share-layers", 2], ["--refit", "sequential"], ["--layout", "pivoted"], ["--split-fused"]):
        assert_refused(run(*words, *more), "--bytes 0.5 does not go with", more[0])
    assert not (tmp_path / "out").exists()

"""Mixtures whose statistics, or whose weights, are more than memory holds: experts in groups, and one by one."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_weights
from support.families import FAMILIES, full_ranks
from support.forked import Forked
from support.launching import together
from support.running import TOKENS
from torch import Tensor

from svdconvert import Calibration, calibrate, convert
from svdconvert.calibration import boundaries
from svdconvert.calibration.collector import statistic_tensors
from svdconvert.calibration.folder import StatisticsFolder, save_statistics, statistics_key
from svdconvert.calibration.run import StatisticsRun
from svdconvert.calibration.text import CalibrationTokens
from svdconvert.errors import InputError
from svdconvert.families.table import ARCHITECTURES
from svdconvert.methods.statistics import ModuleStatistics, Needs
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.calls import block_output
from svdconvert.planning import expert_groups
from svdconvert.planning.events import Events
from svdconvert.planning.expert_groups import in_groups, sums_bytes
from svdconvert.storage.source import LocalSource

# Routers of every form. qwen3_next has an expert for all tokens in its mixture, and Granite one beside it.
MIXTURES = [name for name in ("mixtral", "qwen3_moe", "gpt_oss", "qwen3_next", "granitemoehybrid") if name in FAMILIES]
ALL, INPUTS, KFAC = Needs(True, True, True, True), Needs(True, False, True), Needs(True, True)

Bounds = Callable[[int | None, int | None], None]


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Bounds:
    """Sets what sums and weights of experts may take; None leaves a bound as it is."""
    usual = expert_groups.ON_CPU, expert_groups.WEIGHTS_ON_CPU

    def set_bounds(sums: int | None, weights: int | None) -> None:
        monkeypatch.setattr(expert_groups, "ON_CPU", usual[0] if sums is None else sums)
        monkeypatch.setattr(expert_groups, "WEIGHTS_ON_CPU", usual[1] if weights is None else weights)

    return set_bounds


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"tiger {i} and lion {i * i}" for i in range(200)), encoding="utf-8")
    return Calibration(str(path), samples=5, length=16, batch_size=2)


def started(dense: Path, needs: Needs, work: Path, tokens: CalibrationTokens = TOKENS, **options: Any) -> StatisticsRun:
    paths = list(full_ranks(ARCHITECTURES[json.loads((dense / "config.json").read_text())["model_type"]], dense))
    return StatisticsRun(LocalSource(dense), tokens, needs, paths, work=work, batch_size=2, **options)


def half(dense: Path, needs: Needs, work: Path) -> int:
    """Bytes that the sums of two of four experts take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expert_groups, "ON_CPU", 1)
        groups = started(dense, needs, work)._groups
    return max(each.nbytes for each in groups.values()) // 2


def interrupted_at(step: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Break the run of one group of experts off; gives the blocks whose groups were run."""
    groups, calls = ModelBlocks.some_experts, list[int]()

    def stumbling(*args: Any) -> Any:
        calls.append(args[1])
        if len(calls) == step:
            raise KeyboardInterrupt
        return groups(*args)

    monkeypatch.setattr(ModelBlocks, "some_experts", stumbling)
    return calls


def joined(run: StatisticsRun) -> dict[str, ModuleStatistics]:
    return {name: entry for _, part in run for name, entry in part.items()}


def assert_same(found: dict[str, ModuleStatistics], wanted: dict[str, ModuleStatistics]) -> None:
    assert found.keys() == wanted.keys()
    for name, entry in found.items():
        ours, theirs = statistic_tensors(entry), statistic_tensors(wanted[name])
        assert ours.keys() == theirs.keys()
        assert (entry.tokens, entry.samples) == (wanted[name].tokens, wanted[name].samples)
        for kind, tensor in ours.items():
            assert torch.equal(tensor, theirs[kind]), (name, kind)


@pytest.mark.parametrize(
    ("model_type", "needs", "exact"),
    [*((model_type, ALL, True) for model_type in MIXTURES), ("mixtral", INPUTS, True), ("mixtral", KFAC, False)],
)
def test_the_same_bits(
    model_type: str, needs: Needs, exact: bool, checkpoints: Any, tmp_path: Path, bounds: Bounds
) -> None:
    """In two batches, the second of which is padded; also where weights are read again for the backward pass."""
    dense = checkpoints.dense(model_type)
    wanted = joined(whole := started(dense, needs, tmp_path / "whole", exact=exact))
    small = half(dense, needs, tmp_path / "parts")
    for sums, weights in ((small, None), (small, 0), (None, 0)) if needs == KFAC else ((small, None), (None, 0)):
        bounds(sums, weights)
        parts = list(run := started(dense, needs, tmp_path / "parts", exact=exact))
        assert_same({name: entry for _, part in parts for name, entry in part.items()}, wanted)
        assert run.loss == whole.loss
        for block in {block for block, _ in parts}:
            count = sum(number == block for number, _ in parts)
            with_experts = any(".experts." in name for name in run.modules(block))
            assert count == (3 if sums and with_experts else 1)
        assert [path.name for path in (tmp_path / "parts").rglob("*") if path.is_file()] == ["state.json"]


def test_experts_are_told_once(checkpoints: Any, tmp_path: Path, bounds: Bounds) -> None:
    class Notes(Events):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    told = []
    dense = checkpoints.dense("mixtral")
    for sums in (None, half(dense, INPUTS, tmp_path)):
        bounds(sums, None)
        list(started(dense, INPUTS, tmp_path / str(sums), events=(told_now := Notes())))
        told.append(told_now.notes)
    assert told[0] == told[1]
    assert any("experts have seen fewer tokens than channels" in note for note in told[0])


@pytest.mark.parametrize("needs", [ALL, INPUTS], ids=["backward", "forward"])
def test_broken_off_anywhere(
    needs: Needs, checkpoints: Any, tmp_path: Path, bounds: Bounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every group in turn, while it is run and before it is taken: none that was finished is run again."""
    dense, groups = checkpoints.dense("mixtral"), ModelBlocks.some_experts
    wanted = joined(started(dense, needs, tmp_path / "whole"))
    bounds(half(dense, needs, tmp_path / "whole"), None)
    for step in (1, 2, 5, 6):
        monkeypatch.setattr(ModelBlocks, "some_experts", groups)
        calls = interrupted_at(step, monkeypatch)
        found: dict[str, ModuleStatistics] = {}
        done: set[int] = set()
        for _ in range(2):
            try:
                run, last = started(dense, needs, tmp_path / "cut", skip_blocks=done), None
                for index, part in run:
                    done |= set() if last in (None, index) else {last}
                    found, last = found | part, index
            except KeyboardInterrupt:
                continue
        assert_same(found, wanted)
        assert len(calls) == 6 + 1
    monkeypatch.setattr(ModelBlocks, "some_experts", groups)
    for taken in (1, 2, 3, 9):
        run = started(dense, needs, tmp_path / "cut")
        for _ in range(taken):
            next(run)
        run.close()
        assert_same(joined(started(dense, needs, tmp_path / "cut")), wanted)


def test_what_lies_there_already_needs_no_room(
    checkpoints: Any, tmp_path: Path, bounds: Bounds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that goes on asks for the disk of what is missing."""
    asked: list[int] = []
    monkeypatch.setattr(boundaries, "check_room", lambda copies, more=0: asked.append(more))
    dense = checkpoints.dense("mixtral")
    bounds(half(dense, INPUTS, tmp_path), None)
    asked.clear()
    interrupted_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        joined(started(dense, INPUTS, tmp_path))
    kept = sum(path.stat().st_size for path in tmp_path.rglob("experts/*.safetensors"))
    started(dense, INPUTS, tmp_path)
    assert kept > 0
    assert asked == [asked[0], max(0, asked[0] - kept)]


def test_files_of_something_else_are_not_used(checkpoints: Any, tmp_path: Path, bounds: Bounds) -> None:
    """Other statistics, arithmetic, groups or layers; and a file that was changed is refused."""
    dense = checkpoints.dense("mixtral")
    wanted = joined(started(dense, INPUTS, tmp_path / "whole"))

    def cut(work: Path, needs: Needs = INPUTS, **options: Any) -> Path:
        run = started(dense, needs, work, **options)
        next(run), next(run)
        run.close()
        return min((work / "experts").iterdir())

    small = half(dense, INPUTS, tmp_path / "whole")
    bounds(small, None)
    for number, options in enumerate(({"needs": Needs(True)}, {"exact": False}, {"needs": ALL, "labels": "sampled"})):
        left = cut(tmp_path / str(number), **options)
        assert_same(joined(started(dense, INPUTS, tmp_path / str(number))), wanted)
        assert not left.exists()
    cut(tmp_path / "groups")
    bounds(1, None)
    assert_same(joined(started(dense, INPUTS, tmp_path / "groups")), wanted)
    left = cut(tmp_path / "changed")
    data = bytearray(left.read_bytes())
    data[len(data) // 2] ^= 1
    left.write_bytes(data)
    with pytest.raises(InputError, match=r"experts/block-00000-0000-.* is damaged"):
        joined(started(dense, INPUTS, tmp_path / "changed"))


@pytest.mark.parametrize("options", [{}, {"share_experts": True}], ids=["own", "shared by experts"])
@pytest.mark.parametrize("method", ["whiten", "kfac"])
def test_the_same_result(
    method: str, options: dict[str, Any], checkpoints: Any, text: Calibration, tmp_path: Path, bounds: Bounds
) -> None:
    """From a text, and from statistics in a folder."""
    dense, how = checkpoints.dense("qwen3_moe" if "qwen3_moe" in FAMILIES else "mixtral"), {"device": "cpu", **options}
    small = half(dense, KFAC if method == "kfac" else Needs(input_gram=True), tmp_path / "work")
    losses = []
    for name, sums, weights in (("whole", None, None), ("parts", small, 0)):
        bounds(sums, weights)
        report = convert(dense, tmp_path / name, keep=0.6, method=method, calibration=text, **how)
        losses.append(report.outcome.record["measured_loss"])  # an expert at a time, too
        calibrate(dense, text, stats := tmp_path / f"{name}-stats", methods=[method], device="cpu")
        convert(dense, tmp_path / f"{name}-kept", keep=0.6, method=method, stats=stats, check=False, **how)
    assert losses[0] == losses[1] != 0
    for name in ("", "-kept"):  # they are sums of another precision
        wanted, found = (read_weights(tmp_path / f"{first}{name}") for first in ("whole", "parts"))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_a_folder_that_was_broken_off_within_a_block(checkpoints: Any, tmp_path: Path, bounds: Bounds) -> None:
    """Does not count the block, goes on with it, and writes no part of it twice."""
    dense = checkpoints.dense("mixtral")
    wanted = joined(started(dense, INPUTS, tmp_path / "whole"))
    key = statistics_key(LocalSource(dense), TOKENS, INPUTS)
    bounds(1, None)
    for taken in range(1, 6):
        place = tmp_path / str(taken)
        folder, run = StatisticsFolder(place, key, create=True), started(dense, INPUTS, place / "work")
        for _ in range(taken):
            index, part = next(run)
            folder.save(index, part, whole=run.modules(index))
        run.close()
        folder = StatisticsFolder(place, key, create=True)
        assert folder.blocks == ({0} if taken == 5 else set())
        written = {path: path.stat().st_mtime_ns for path in place.glob("*.safetensors")}
        assert len(written) == taken
        save_statistics(folder, started(dense, INPUTS, place / "work", skip_blocks=folder.blocks))
        assert {path: path.stat().st_mtime_ns for path in written} == written
        folder = StatisticsFolder(place, key)
        assert folder.blocks == {0, 1, 2}
        assert_same(folder.load(list(wanted)), wanted)
    next(place.glob("block-00001-2.safetensors")).unlink()
    assert StatisticsFolder(place, key).blocks == {0, 2}


def test_several_processes(
    launcher: Forked, checkpoints: Any, text: Calibration, tmp_path: Path, bounds: Bounds
) -> None:
    """Have the same statistics as one, up to rounding; the leader writes them."""
    dense = checkpoints.dense("mixtral")
    small = half(dense, KFAC, tmp_path / "work")
    constants = {"svdconvert.planning.expert_groups.ON_CPU": small}
    bounds(small, None)
    calibrate(dense, text, tmp_path / "one", device="cpu")
    line: list[object] = ["calibrate", dense, "--out", tmp_path / "two", "--device", "cpu", "--calib", text.text]
    line += ["--calib-samples", 5, "--calib-length", 16, "--calib-batch-size", 2, "--method", "kfac"]
    done = together(launcher, 2, *line, constants=constants)
    assert [ended.status for ended in done] == [0, 0], done
    one, two = (StatisticsFolder(tmp_path / name) for name in ("one", "two"))
    names = list(full_ranks(ARCHITECTURES["mixtral"], dense))
    assert sorted(path.name for path in one.folder.iterdir()) == sorted(path.name for path in two.folder.iterdir())
    for name, entry in two.load(names).items():
        for kind, tensor in statistic_tensors(one.load([name])[name]).items():
            other = getattr(entry, kind)
            torch.testing.assert_close(other, tensor, rtol=0, atol=float(tensor.abs().max()) * 1e-5)


@pytest.mark.parametrize("grouped", [False, True])
def test_one_expert_in_memory(grouped: bool, checkpoints: Any) -> None:
    """Neither forward nor backward, nor between the two, are two experts' weights there."""
    blocks = ModelBlocks(LocalSource(checkpoints.dense("mixtral")))
    alive: dict[str, Any] = {}
    counts: list[int] = []
    read = blocks._weights.read

    def counted(reader: Any, name: str, like: Tensor, rows: slice | None = None) -> Tensor:
        tensor = read(reader, name, like, rows)
        if ".experts." in name:
            alive[name] = weakref.ref(tensor)
            counts.append(len({name.split(".")[5] for name, found in alive.items() if found() is not None}))
        return tensor

    blocks._weights.read = counted  # type: ignore[method-assign]
    hidden, mask = torch.randn(2, 7, blocks.hidden_size), torch.ones(2, 7, dtype=torch.bool)
    chosen = {f"block_sparse_moe.experts.{number}" for number in (0, 2)}
    context = blocks.some_experts(1, chosen, True) if grouped else blocks.block(1, by_expert=True)
    with context as block:
        given = hidden.clone().requires_grad_()
        output = block_output(blocks.mixture(block)(given)) if grouped else blocks.run(block, given, mask)
        assert not any(found() is not None for found in alive.values())
        before = len(counts)
        output.square().sum().backward()
        assert len(counts) > before
        gradient = given.grad
    assert set(counts) == {1}
    assert {name.split(".")[5] for name in alive} == ({"0", "2"} if grouped else {"0", "1", "2", "3"})
    assert not any(found() is not None for found in alive.values())
    if not grouped:
        with blocks.block(1) as block:
            blocks.run(block, again := hidden.clone().requires_grad_(), mask).square().sum().backward()
        assert gradient is not None
        assert torch.equal(gradient, again.grad)


def test_a_damaged_expert_is_named(checkpoints: Any, tmp_path: Path, bounds: Bounds) -> None:
    """Inputs that are not finite, of one expert: the others' sums do not have them."""
    bounds(1, None)
    dense = checkpoints.dense("mixtral")
    run = started(dense, INPUTS, tmp_path)
    damaged = run._blocks._layers[0].get_submodule("block_sparse_moe.experts.1.w1")
    damaged.register_forward_pre_hook(lambda module, args: (args[0] * torch.inf,))
    with pytest.raises(InputError, match=r"block 0 gives NaN|layers.0.block_sparse_moe.experts.1"):
        joined(run)


def test_groups() -> None:
    assert in_groups([3, 3, 3, 9, 1], 6) == [[0, 1], [2], [3], [4]]
    assert in_groups([], 6) == []
    shapes = {"e.0.gate": (5, 7), "e.0.up": (5, 7), "e.0.down": (7, 5)}
    assert sums_bytes(shapes, "down", input_grams=True, output_grams=False) == 8 * (49 + 25)
    assert sums_bytes(shapes, "down", input_grams=True, output_grams=True) == 8 * (49 + 25 + 25 + 25 + 49)
    assert sums_bytes(shapes, "down", input_grams=False, output_grams=False) == 0


def test_few_experts_are_not_grouped(checkpoints: Any, tmp_path: Path, bounds: Bounds) -> None:
    """What counts is the statistics that are wanted."""
    dense = checkpoints.dense("mixtral")
    bounds(half(dense, INPUTS, tmp_path), None)
    names = [name for name in full_ranks(ARCHITECTURES["mixtral"], dense) if ".experts.1." in name]
    run = StatisticsRun(LocalSource(dense), replace(TOKENS), INPUTS, names, work=tmp_path)
    assert [sorted(part) for _, part in run] == [sorted(n for n in names if f"layers.{i}." in n) for i in range(3)]

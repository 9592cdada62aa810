"""``--solver fast`` as people meet it: where it acts, what it tells, what it refuses, and the same bytes every time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.accelerator import accelerator  # noqa: F401 - a fixture
from support.checkpoints import read_weights, tree, write_checkpoint
from support.forked import Forked
from support.launching import together
from support.results import products

from svdconvert import Events, InputError, convert, plan
from svdconvert.planning.partition import step_cost
from svdconvert.planning.steps import Step
from svdconvert.solvers import table as fast
from svdconvert.solvers.fast import LEAST_SIDE

Run = Callable[..., SimpleNamespace]

# The least size at which it acts. At this rank it does so on square matrices only.
HIDDEN, RANK = LEAST_SIDE, 100
SQUARE = ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
ACTS = "3 of 4 matrices"


def model(folder: Path, **changed: torch.Tensor) -> Path:
    """One layer with square matrices but for queries, keys and values; float32.

    Args:
        folder: to write.
        changed: linear layers, by the last part of their names.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "embed_in.weight": (160, HIDDEN),
        "final_layer_norm.weight": (HIDDEN,),
        "final_layer_norm.bias": (HIDDEN,),
    }
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors |= {f"layers.0.{norm}.{kind}": (HIDDEN,) for kind in ("weight", "bias")}
    for name in ("attention.query_key_value", *SQUARE):
        rows = 3 * HIDDEN if name.endswith("value") else HIDDEN
        tensors |= {f"layers.0.{name}.weight": (rows, HIDDEN), f"layers.0.{name}.bias": (rows,)}
    made = {
        f"gpt_neox.{name}": torch.randn(shape, generator=generator) * torch.linspace(1, 0.2, shape[-1])
        for name, shape in tensors.items()
    }
    made["embed_out.weight"] = torch.randn(160, HIDDEN, generator=generator)
    for name, tensor in changed.items():
        (key,) = (key for key in made if key.endswith(f".{name}.weight"))
        made[key] = tensor
    config = {"hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": 1, "torch_dtype": "float32"}
    return write_checkpoint(folder, made, config=config)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    return model(tmp_path_factory.mktemp("dense") / "square")


@pytest.fixture(scope="module")
def converted(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the fast solver, in one process with one worker. Read only."""
    folder = tmp_path_factory.mktemp("fast") / "out"
    convert(dense, folder, rank=RANK, solver="fast", device="cpu", workers=1, check=False)
    return folder


def matrices(folder: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads((folder / "svdconvert.json").read_text())["matrices"]
    return found


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((2048, 2048), 256, True),
        ((2048, 2048), 257, False),
        ((8192, 2048), 170, True),
        ((8192, 2048), 171, False),
        ((2048, 8192), 170, True),
        ((2048, 8192), 171, False),
        ((1023, 4096), 8, False),
        ((1024, 4096), 8, True),
        ((1023, 1023), 8, False),
    ],
)
def test_where_it_acts(shape: tuple[int, int], rank: int, expected: bool) -> None:
    assert fast.SOLVERS["fast"].acts(shape, rank) is expected


def test_plan_tells(dense: Path, run: Run) -> None:
    note = f"fast solver (on the CPU): {ACTS}; the others are too small, or their ranks too high"
    for line in (("plan", dense), (dense, "--dry-run")):
        result = run(*line, "--rank", RANK, "--solver", "fast")
        assert result.code == 0
        assert note in result.out
        assert "fast solver" not in run(*line, "--rank", RANK).out
    told = json.loads(run("plan", dense, "--rank", RANK, "--solver", "fast", "--json").out)
    assert told["settings"]["solver"] == "fast"
    assert any(text.startswith(note) for text in told["notes"])
    assert "fast solver (on the CPU): all 4 matrices" in plan(dense, rank=64, solver="fast").notes
    split = plan(dense, rank=RANK, solver="fast", split_fused=True)
    assert "fast solver (on the CPU): all 6 matrices" in split.notes
    assert any(
        note.startswith("fast solver (on the CPU): 0 of 4") for note in plan(dense, rank=300, solver="fast").notes
    )


def test_conversion_tells(dense: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(dense, "--rank", RANK, "--solver", "fast", "--device", "cpu", "--out", out)
    assert result.code == 0, result.err
    assert f"fast solver (on the CPU): {ACTS}; the others" in result.out
    assert f"fast solver     {ACTS}, estimated to be at most " in result.out
    assert "not be certified" not in result.out
    source, found = read_weights(dense), products(out)
    for module, matrix in matrices(out).items():
        weight = source[f"gpt_neox.{module}.weight"].double()
        values = torch.linalg.svdvals(weight)
        optimum = float(values[RANK:].norm() / values.norm())
        error = float((weight - found[f"gpt_neox.{module}.weight"]).norm() / values.norm())
        assert matrix["relative_error"] == pytest.approx(error, rel=1e-4)
        if module.endswith(SQUARE):
            assert matrix["solver"] == "filtered"
            assert error / optimum - 1 <= matrix["certificate"] <= 1e-3
            assert optimum / 1.001 <= matrix["optimal_error"] <= optimum * (1 + 1e-6)
            assert error > optimum * (1 + 1e-6)  # so that another solver was at work
        else:
            assert "solver" not in matrix
            assert "certificate" not in matrix
            assert error == pytest.approx(optimum, rel=1e-6)
    card = (out / "README.md").read_text()
    assert f"Fast solver: {ACTS}, estimated to be at most" in card
    assert "--solver fast" in card
    assert run("verify", out, "--against", dense).code == 0


def test_pivoted(dense: Path, tmp_path: Path) -> None:
    made = {}
    for solver in fast.SOLVERS:
        convert(dense, tmp_path / solver, rank=RANK, layout="pivoted", solver=solver, device="cpu", check=False)
        made[solver] = matrices(tmp_path / solver)
    for module, matrix in made["fast"].items():
        assert matrix["relative_error"] == pytest.approx(made["exact"][module]["relative_error"], rel=1e-3)
        assert ("certificate" in matrix) == module.endswith(SQUARE)


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_nothing(workers: int, dense: Path, converted: Path, tmp_path: Path) -> None:
    torch.manual_seed(workers)
    convert(dense, tmp_path / "out", rank=RANK, solver="fast", device="cpu", workers=workers, check=False)
    assert tree(tmp_path / "out") == tree(converted)


def test_processes_change_nothing(dense: Path, converted: Path, launcher: Forked, tmp_path: Path) -> None:
    line = [dense, "--rank", RANK, "--solver", "fast", "--device", "cpu", "--no-check"]
    done = together(launcher, 2, *line, "--workers", 1, "--out", tmp_path / "out")
    assert [ended.status for ended in done] == [0, 0], done
    assert tree(tmp_path / "out") == tree(converted)


class _Stop(Events):
    """Breaks off after two matrices."""

    def __init__(self) -> None:
        self.left = 2

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise InputError("enough")


def test_resumed(dense: Path, converted: Path, run: Run, tmp_path: Path) -> None:
    """And another solver is another job."""
    out = tmp_path / "out"
    settings: dict[str, Any] = {"rank": RANK, "device": "cpu", "workers": 1, "check": False}
    with pytest.raises(InputError, match="enough"):
        convert(dense, out, **settings, solver="fast", events=_Stop())
    refused = run(dense, "--rank", RANK, "--device", "cpu", "--out", out)
    assert refused.code == 2
    assert 'unfinished job with another solver ("fast", now "exact"); finish it as it was begun' in refused.err
    torch.manual_seed(7)
    report = convert(dense, out, **settings, solver="fast")
    assert 0 < report.outcome.resumed < 4
    assert tree(out) == tree(converted)
    again = run(dense, "--rank", RANK, "--solver", "fast", "--device", "cpu", "--out", out)
    assert again.code == 0
    assert f"fast solver     {ACTS}" in again.out
    assert run(dense, "--rank", RANK, "--device", "cpu", "--out", out).code == 2


REFUSED: Mapping[str, tuple[list[object], str]] = {
    "text": (["--calib", "TEXT"], "--method kfac"),
    "method": (["--method", "whiten", "--calib", "TEXT"], "--method whiten"),
    "allocation": (["--allocation", "global"], "--allocation global"),
    "work": (["--work", "WORK"], "--work or --keep-work"),
    "kept": (["--keep-work"], "--work or --keep-work"),
    "refit": (["--method", "svd", "--refit", "sequential", "--calib", "TEXT"], "--refit sequential"),
    "shared": (["--share-layers", "2"], "--share-layers 2"),
}


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["convert", "dry run"])
@pytest.mark.parametrize(("options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(
    options: list[object], words: str, dry: list[str], dense: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    given = [{"TEXT": text, "WORK": tmp_path / "work"}.get(str(option), option) for option in options]
    line = [dense, "--rank", 8, "--device", "cpu", "--out", tmp_path / "out", *given, *dry]
    result = run(*line, "--solver", "fast")
    assert result.code == 2
    assert f"--solver fast is for plain SVD of single matrices and does not go with {words};" in result.err
    assert result.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unknown(dense: Path, run: Run, tmp_path: Path) -> None:
    assert run(dense, "--rank", 8, "--solver", "quick", "--out", tmp_path / "out").code == 2
    with pytest.raises(InputError, match="solver='quick' is unknown; choose exact or fast"):
        convert(dense, tmp_path / "out", rank=8, solver="quick")
    with pytest.raises(InputError, match="solver='quick' is unknown"):
        plan(dense, rank=8, solver="quick")


def thin(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(HIDDEN, rank, generator=generator) @ torch.randn(rank, HIDDEN, generator=generator)


def test_done_again_exactly(run: Run, tmp_path: Path) -> None:
    """Zeros, a matrix of low rank, and a range beyond float32's: byte for byte what the exact solver gives."""
    outlier = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(2))
    outlier[0, 0] = 1e5
    dense = model(
        tmp_path / "model",
        **{
            "attention.dense": torch.zeros(HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h": thin(20),
            "mlp.dense_4h_to_h": outlier,
        },
    )
    for solver in fast.SOLVERS:
        line = [dense, "--rank", RANK, "--solver", solver, "--device", "cpu", "--workers", 1, "--no-check"]
        result = run(*line, "--out", tmp_path / solver)
        assert result.code == 0, result.err
    assert "0 of 4 matrices; 3 more could not be certified and were solved exactly" in result.out
    assert "3 more could not be certified" in (tmp_path / "fast" / "README.md").read_text()
    exact, other = read_weights(tmp_path / "exact"), read_weights(tmp_path / "fast")
    assert exact.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in exact.items())
    for module, matrix in matrices(tmp_path / "fast").items():
        assert matrix.pop("solver", None) == ("exact" if module.endswith(SQUARE) else None)
        expected = matrices(tmp_path / "exact")[module]
        assert {**matrix, "seconds": 0} == {**expected, "seconds": 0}


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale(scale: float, run: Run, tmp_path: Path) -> None:
    """Squares beyond float32's range, at either end, are certified all the same."""
    weight = scale * torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(3))
    dense = model(tmp_path / "model", **{"mlp.dense_h_to_4h": weight})
    for solver in fast.SOLVERS:
        line = [dense, "--rank", RANK, "--solver", solver, "--device", "cpu", "--no-check", "--out", tmp_path / solver]
        assert run(*line, "--targets", "mlp.dense_h_to_4h").code == 0
    (matrix,), (exact,) = (matrices(tmp_path / solver).values() for solver in ("fast", "exact"))
    assert matrix["solver"] == "filtered"
    assert 1 < matrix["relative_error"] / exact["relative_error"] <= 1 + matrix["certificate"]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_not_finite(wrong: float, run: Run, tmp_path: Path) -> None:
    weight = thin(HIDDEN)
    weight[3, 5] = wrong
    dense = model(tmp_path / "model", **{"attention.dense": weight})
    said = {}
    for solver in fast.SOLVERS:
        line = [dense, "--rank", RANK, "--solver", solver, "--device", "cpu", "--out", tmp_path / solver]
        result = run(*line)
        assert result.code == 2
        said[solver] = result.err
    assert "attention.dense.weight cannot be converted: it has NaN or infinite entries" in said["fast"]
    assert said["fast"] == said["exact"]


def test_on_a_gpu(
    dense: Path,
    accelerator: torch.device,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Not measured there: solved exactly, which is said."""
    monkeypatch.setattr("svdconvert.commands.convert.resolve_device", lambda name: name)
    report = convert(dense, tmp_path / "out", rank=RANK, solver="fast", device=str(accelerator), check=False)
    assert report.plan.notes[-1] == fast.SOLVERS["fast"].cpu_only
    record = json.loads((tmp_path / "out" / "svdconvert.json").read_text())
    assert fast.SOLVERS["fast"].cpu_only in record["notes"]
    assert record["settings"]["solver"] == "exact"
    assert not any("solver" in matrix for matrix in record["matrices"].values())
    assert "fast" not in (tmp_path / "out" / "README.md").read_text().lower()


def test_its_steps_are_cheaper(dense: Path) -> None:
    """To the split among processes."""
    cost = {solver: [step_cost(s) for s in plan(dense, rank=RANK, solver=solver).steps] for solver in fast.SOLVERS}
    cheaper = [one < other for one, other in zip(cost["fast"], cost["exact"], strict=True)]
    assert sum(cheaper) == 3
    assert all(one <= other for one, other in zip(cost["fast"], cost["exact"], strict=True))

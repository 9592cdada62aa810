"""Spectra against full SVDs in float64, and the command that shows them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import LINEARS, TARGETS, read_weights
from support.methods import gradients

from svdconvert import Calibration, InputError, calibrate, convert, spectrum
from svdconvert.commands.spectra import MatrixSpectrum
from svdconvert.factoring import decomposer
from svdconvert.layouts.table import LAYOUTS
from svdconvert.linalg.results import Decomposition
from svdconvert.methods.table import METHODS
from svdconvert.words import percent

Run = Callable[..., SimpleNamespace]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    words = ["호랑이", "tiger", "옛날", "mountain", "살았다", "0123"]
    path.write_text("\n\n".join(" ".join(words[(7 * i + 3 * j * j) % 6] for j in range(12)) for i in range(60)))
    return Calibration(str(path), samples=24, length=48)


def root(gram: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(gram)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_plain(layout: str, dense: Path) -> None:
    found = spectrum(dense, layout=layout, device="cpu")
    weights = read_weights(dense)
    assert [matrix.module for matrix in found.matrices] == TARGETS
    assert list(found.kinds) == [(name, shape) for name, shape in LINEARS.items()]
    for matrix in found.matrices:
        values = torch.linalg.svdvals(weights[f"gpt_neox.{matrix.module}.weight"].double())
        shares = values / values.sum()
        energy = values.square().cumsum(0) / values.square().sum()
        assert np.allclose(np.sqrt(matrix.energies), values, rtol=1e-5)
        assert matrix.effective_rank == pytest.approx(math.exp(-float((shares * shares.log()).sum())), rel=1e-5)
        assert matrix.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-5)
        for share in (0.5, 0.9, 0.95, 0.99):
            assert matrix.rank_at(share) == int((energy < share).sum()) + 1
        m, n = matrix.shape
        highest = max(r for r in range(min(m, n) + 1) if LAYOUTS[layout].cost(r, (m, n)) < m * n)
        assert matrix.highest_saving == highest
        assert matrix.break_even_energy == pytest.approx(float(energy[highest - 1]), rel=1e-6)
        assert matrix.output_errors is None
        if layout == "balanced":
            assert matrix.break_even == pytest.approx(m * n / (m + n))


@pytest.mark.parametrize("method", ["whiten", "kfac"])
def test_in_the_metrics_of_a_method(method: str, dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    """Singular values, and the outputs' error of the products that a conversion really writes."""
    found = spectrum(dense, method=method, calibration=calibration, work=tmp_path / "work", device="cpu")
    report = convert(
        dense, tmp_path / "out", rank=10, method=method, calibration=calibration, work=tmp_path / "work",
        dtype="float32", device="cpu", check=False,
    )  # fmt: skip
    weights, factors = read_weights(dense), read_weights(tmp_path / "out")
    moments = gradients(dense, calibration)
    for matrix in found.matrices:
        name = f"gpt_neox.{matrix.module}."
        inputs, outputs, _ = moments[matrix.module]
        weight = weights[f"{name}weight"].double()
        amount = METHODS[method].options["shrinkage"]
        right, left = ((1 - amount) * gram + amount * gram.diagonal().diag() for gram in (inputs, outputs))
        outer = root(left) if method == "kfac" else torch.eye(len(left)).double()
        values = torch.linalg.svdvals(outer @ weight @ root(right))
        assert np.allclose(np.sqrt(matrix.energies), values, rtol=1e-3, atol=1e-6 * float(values[0]))
        error = weight - factors[f"{name}up.weight"].double() @ factors[f"{name}down.weight"].double()
        direct = math.sqrt(float((error @ inputs * error).sum() / (weight @ inputs * weight).sum()))
        assert matrix.output_errors is not None
        assert matrix.output_errors[10] == pytest.approx(direct, rel=1e-3)
        assert matrix.output_errors[0] == 1
        told = report.matrices[matrix.module]
        assert told["output_error"] == pytest.approx(direct, rel=1e-3)
        assert ("predicted_loss" in told) == (method == "kfac")
    if method == "kfac":
        total = sum(told["predicted_loss"] for told in report.matrices.values())
        assert report.outcome.record["predicted_loss"] == pytest.approx(total)
        assert total == pytest.approx(sum(matrix.energies[10:].sum() for matrix in found.matrices) / 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| lost, lowest / median / highest | weights | outputs |" in card
    assert ("predicted loss" in card) == (method == "kfac")


def test_work_is_shared_with_conversions(
    dense: Path, calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways: what either has decomposed the other does not decompose again."""
    settings = {"method": "whiten", "calibration": calibration, "device": "cpu"}
    first = spectrum(dense, work=tmp_path / "work", **settings)
    convert(dense, tmp_path / "kept", keep=0.5, keep_work=True, check=False, **settings)
    plain = convert(dense, tmp_path / "svd", rank=16, work=tmp_path / "plain", device="cpu", check=False)

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was computed again")

    monkeypatch.setattr(decomposer, "decompose", fail)
    convert(dense, tmp_path / "out", keep=0.5, work=tmp_path / "work", check=False, **settings)
    again = spectrum(dense, work=tmp_path / "kept-work", **settings)
    assert again.to_json() == first.to_json()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "kept" / "model.safetensors"
    ).read_bytes()
    found = spectrum(dense, work=tmp_path / "plain", device="cpu")
    errors = [math.sqrt(1 - matrix.energy[16]) for matrix in found.matrices]
    assert errors == pytest.approx(plain.errors, rel=1e-3)


def test_statistics_folder(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    calibrate(dense, calibration, tmp_path / "stats", methods=["whiten"], device="cpu")
    one = spectrum(dense, method="whiten", stats=tmp_path / "stats", targets="layers.1.*", device="cpu")
    other = spectrum(dense, method="whiten", calibration=calibration, targets=["layers.1.*"], device="cpu")
    assert len(one.matrices) == len(LINEARS)
    for a, b in zip(one.matrices, other.matrices, strict=True):
        assert a.to_json() == b.to_json()


def test_memory_holds_one_matrix(dense: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a work folder nothing of a decomposition outlives the next one but its values."""
    import weakref

    real, bases = decomposer.decompose, []

    def watched(*args: object, **kwargs: object) -> Decomposition:
        found = real(*args, **kwargs)  # type: ignore[arg-type]
        bases.append(weakref.ref(found.basis))
        return found

    monkeypatch.setattr(decomposer, "decompose", watched)
    spectrum(dense, device="cpu")
    assert len(bases) == len(TARGETS)
    assert not any(basis() is not None for basis in bases)


@settings(max_examples=60)
@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=40), shape=st.sampled_from([1, 3]))
def test_laws(values: list[float], shape: int) -> None:
    energies = np.sort(np.array(values))[::-1] ** 2
    matrix = MatrixSpectrum("layers.0.a", (shape * len(values), len(values)), energies, None)
    nonzero = int((energies > 0).sum())
    assert 0 <= matrix.stable_rank <= nonzero * (1 + 1e-9)
    assert matrix.stable_rank <= matrix.effective_rank**2 * (1 + 1e-9)
    assert matrix.effective_rank <= nonzero * (1 + 1e-9)
    assert np.all(np.diff(matrix.energy) >= -1e-12)
    assert matrix.rank_at(0.9) <= matrix.rank_at(0.99) <= len(values)
    json.dumps(matrix.to_json(), allow_nan=False)


def test_flat_and_single() -> None:
    flat = MatrixSpectrum("layers.0.a", (8, 8), np.ones(8), None)
    assert (flat.effective_rank, flat.stable_rank, flat.rank_at(1)) == (pytest.approx(8), pytest.approx(8), 8)
    single = MatrixSpectrum("layers.0.a", (8, 8), np.array([4.0] + [0.0] * 7), None)
    assert (single.effective_rank, single.stable_rank, single.rank_at(0.99)) == (1, 1, 1)
    zero = MatrixSpectrum("layers.0.a", (8, 8), np.zeros(8), np.zeros(9))
    assert (zero.effective_rank, zero.stable_rank, zero.break_even_output_error) == (0, 0, 0)
    assert percent(0.977) == "97.7%"
    assert percent(0.99982) == "99.982%"


# --- the command


def test_command(dense: Path, run: Run, tmp_path: Path) -> None:
    """Table for people, JSON and a picture in a folder, another picture where it is asked for."""
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "spectra", tmp_path / "picture.svg"
    done = run("spectrum", dense, "--device", "cpu", "--out", out, "--plot", picture)
    assert done.code == 0, done.err
    for word in (
        "effective rank",
        "break-even",
        "lowest",
        "median",
        "highest",
        "mlp.dense_h_to_4h",
        "95% of the energy",
    ):
        assert word in done.out
    assert "layers.0" not in done.out
    assert (out / "spectrum.png").read_bytes().startswith(b"\x89PNG")
    assert picture.read_text().lstrip().startswith("<?xml")
    told = json.loads((out / "spectrum.json").read_text())
    assert told["method"] == "svd"
    assert list(told["matrices"]) == TARGETS
    assert len(told["matrices"][TARGETS[0]]["singular_values"]) == 64
    assert {path.name for path in out.iterdir()} == {"spectrum.json", "spectrum.png"}


def test_json_and_per_layer(dense: Path, run: Run) -> None:
    result = run("spectrum", dense, "--device", "cpu", "--json", "--targets", "attention.dense")
    told: Mapping[str, object] = json.loads(result.out)
    assert result.code == 0
    assert list(told["matrices"]) == [f"layers.{i}.attention.dense" for i in range(3)]  # type: ignore[call-overload]
    listed = run("spectrum", dense, "--device", "cpu", "--per-layer").out
    assert all(target in listed for target in TARGETS)
    assert "median " not in listed


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("must end in .png", ["--plot", "picture.gif"]),
        ("does not exist", ["--plot", "nowhere/picture.png"]),
        ("needs a text", ["--method", "whiten"]),
        ("unknown; choose one of svd", ["--method", "nonsense"]),
        ("matches no linear layer", ["--targets", "nonsense"]),
        ("has no effect on --method svd", ["--method", "svd", "--calib", "text"]),
        ("has no effect on --method svd", ["--alpha", "0.5"]),
    ],
)
def test_refusals(words: str, options: list[str], dense: Path, run: Run) -> None:
    result = run("spectrum", dense, "--device", "cpu", *options)
    assert result.code == 2
    assert words in result.err
    assert "Traceback" not in result.err


def test_out_is_a_file(dense: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = run("spectrum", dense, "--out", tmp_path / "file")
    assert (result.code, "is a file" in result.err) == (2, True)


def test_another_work_folder(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    spectrum(dense, work=tmp_path / "work", device="cpu")
    with pytest.raises(InputError, match="another method"):
        spectrum(dense, method="whiten", calibration=calibration, work=tmp_path / "work", device="cpu")


HIDDEN = """
import sys
sys.modules["matplotlib"] = None
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
from svdconvert.cli.app import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "arguments",
    [
        ["spectrum", "--plot", "x.png"],
        ["spectrum", "--out", "x"],
        ["sweep", "--keep", "0.5", "--text", "x.txt", "--out", "x"],
    ],
)
def test_without_matplotlib(arguments: list[str], dense: Path, tmp_path: Path) -> None:
    """Said in one sentence, before any work: not even torch is loaded."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", HIDDEN, arguments[0], str(dense), *arguments[1:]],
        capture_output=True, text=True, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    message = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert message == ["Error: drawing needs matplotlib; install it with `pip install 'svdconvert[plots]'`"]
    assert not any(line.split("|")[-1].strip() == "torch" for line in done.stderr.splitlines())
    assert not list(tmp_path.iterdir())


# --- what a conversion keeps


def test_keep_work(dense: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(dense, "--rank", 16, "--device", "cpu", "--no-check", "--keep-work", "--out", out)
    assert result.code == 0
    assert f"{out}-work" in result.out.replace("\n", "")
    assert len(list((tmp_path / "out-work" / "decompositions").glob("*.safetensors"))) == len(TARGETS)
    assert not (out / ".svdconvert").exists()
    both = run(dense, "--rank", 16, "--keep-work", "--work", tmp_path / "w", "--out", tmp_path / "other")
    assert both.code == 2
    assert "either --keep-work" in both.err
    assert not (tmp_path / "other").exists()


def test_nothing_is_kept_otherwise(dense: Path, calibration: Calibration, tmp_path: Path) -> None:
    convert(dense, tmp_path / "out", keep=0.5, method="kfac", calibration=calibration, device="cpu", check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list(tmp_path.rglob("decompositions"))

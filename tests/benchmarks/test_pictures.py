"""Every benchmark's picture, from what its own functions make of small or made-up measurements."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from . import (
    calibration,
    conversion,
    growth,
    harness,
    inference,
    latent_cache,
    memory,
    metrics,
    pictures,
    processes,
    solver,
)
from .__main__ import ALL
from .geometry import MODELS, resized
from .measure import Measured, save

TINY = resized(MODELS["1.3b"], hidden=64, layers=2, vocab=256)


def measured(output: Any = None) -> Measured:
    """A run of a command that has not been run."""
    return Measured(2.0, 3.0, 0.1, 300_000_000, 10, 20, 0.5, 0.01, {}, json.dumps(output))


def convert(source: Path, out: Path, rank: int, workers: int, *more: object) -> dict[str, Any]:
    """As ``conversion.convert`` tells of a conversion, two layers of which take a second."""
    return measured().to_json() | {
        "workers": workers,
        "tool_seconds": 1.5 / workers,
        "conversion_peak_bytes": 250_000_000,
        "solver_s": 1.0,
        "precisions": ["float32"],
        "relative_error": {"mean": 0.1, "worst": 0.2},
        "excess_worst": 1e-7,
        "params": {"before": 1000, "after": 500},
        "weight_bytes": 1_000_000,
        "checks": [],
    }


def full_svd(*arguments: object) -> dict[str, Any]:
    return measured().to_json() | {"loading_s": 1.0, "layer_s": 4.0, "layer_cpu_s": 8.0}


def written(arguments: Sequence[str], **more: object) -> Measured:
    """Of a conversion that leaves an empty folder."""
    if "--rank" in arguments:
        Path(arguments[list(arguments).index("--out") + 1]).mkdir(parents=True)
    return measured({"seconds": 1.5})


def calibrated(arguments: Sequence[str]) -> Measured:
    """As ``calibration.measure`` tells of two blocks."""
    run = {"wall_s": 1.0, "cpu_s": 2.0, "peak_bytes": 400_000_000}
    phases = {name: [run] * (2 if "a block" in name else 1) for name in calibration.PHASES}
    phases[calibration.GRAMS] = [{**run, "peak_bytes": None}]
    return measured({"wall_s": 9.0, "cpu_s": 16.0, "threads": 2, "statistics_bytes": 10, "phases": phases})


def of_solver(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    return solver.benchmark(["1.3b", "3.8b"], "llm", 1, hidden=64), solver.markdown


def of_metrics(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    return metrics.benchmark("1.3b", 64, "two", 1), metrics.markdown


def of_memory(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    patch.setattr(memory, "convert", lambda *args: measured().to_json() | {"weight_bytes": 1_000_000})
    return memory.benchmark(64, [2, 4], 256, 2), memory.markdown


def of_calibration(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    patch.setattr(calibration, "run", calibrated)
    return calibration.benchmark(TINY, [2, 4], "kfac", 64, 16, 2, 2), calibration.markdown


def of_growth(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    patch.setattr(growth, "convert", convert)
    return growth.benchmark({"layers": [2, 4], "hidden": [64, 128], "rank": [8, 16]}, 2), growth.markdown


def of_inference(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    patch.setattr(
        inference,
        "run",
        lambda line: measured({"step_s": 0.5 if "dense" in line else 0.25, "peak_bytes": 500_000_000}),
    )
    options = {"model": "1.3b", "dtype": "float32", "device": "cpu", "batch": [1, 2], "prompt": 4, "tokens": 2}
    options |= {
        "repeats": 2,
        "compile": False,
        "cpu_time": False,
        "train_steps": 1,
        "train_length": 8,
        "variants": None,
    }
    return inference.benchmark(argparse.Namespace(**options), TINY, 16), inference.markdown


def of_latent_cache(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    return latent_cache.benchmark(TINY, 16, 15, [1, 2], 2, "float32"), latent_cache.markdown


def of_processes(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    patch.setattr(processes, "run", written)
    return processes.benchmark(TINY, 16, 2, 2, scratch), processes.markdown


def of_conversion(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    for name, made_up in (("convert", convert), ("full_svd", full_svd)):
        patch.setattr(conversion, name, made_up)
    return conversion.benchmark(TINY, 16, scratch, workers=[1, 2], repeats=2), conversion.markdown


def of_filtered(patch: pytest.MonkeyPatch, scratch: Path) -> tuple[dict[str, Any], Any]:
    rows = [
        {"shape": shape, "rank": rank, "exact_s": 1.0, "filtered_s": rank / 64, "excess": 1e-4}
        for shape in ([6144, 2048], [2048, 8192])
        for rank in (32, 64, 128)
    ]
    return {"rows": rows}, lambda _: "filtered"


RESULTS: Mapping[str, Callable[[pytest.MonkeyPatch, Path], tuple[dict[str, Any], Any]]] = {
    "solver": of_solver,
    "metrics": of_metrics,
    "memory": of_memory,
    "calibration": of_calibration,
    "growth": of_growth,
    "inference": of_inference,
    "latent-cache": of_latent_cache,
    "processes": of_processes,
    "conversion": of_conversion,
    "filtered": of_filtered,
}


def content(path: Path) -> int:
    """How many colours a picture has."""
    from matplotlib.image import imread

    pixels = imread(path)
    return len({tuple(colour) for colour in pixels.reshape(-1, pixels.shape[-1])[::7].tolist()})


def overlapping(figure: Any) -> list[tuple[str, str]]:
    """Pairs of texts that lie on each other, and texts that leave the picture."""
    figure.savefig(io.BytesIO(), format="png")  # which is when everything gets its place
    texts = [text for panel in figure.axes for text in (*panel.texts, panel.xaxis.label, panel.yaxis.label)]
    for panel in figure.axes:
        low, high = sorted(panel.get_ylim())  # there are labels beyond that are never drawn
        texts += [label for label in panel.get_yticklabels() if low <= label.get_position()[1] <= high]
    texts += [figure._suptitle, *(text for legend in figure.legends for text in legend.get_texts())]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_visible() and text.get_text()]
    outside = [(text, "edge") for text, box in boxes if not figure.bbox.padded(2).contains(*box.min)]
    outside += [(text, "edge") for text, box in boxes if not figure.bbox.padded(2).contains(*box.max)]
    return outside + [(a, b) for (a, one), (b, two) in itertools.combinations(boxes, 2) if one.padded(-1).overlaps(two)]


def test_all_benchmarks_have_a_picture_and_a_test() -> None:
    assert RESULTS.keys() == pictures.PICTURES.keys()
    drawn = {name: pictures.picture_of(name) for name in ALL}
    for name, (module, *_) in ALL.items():
        assert drawn[name] is pictures.PICTURES[module.replace("_", "-")], name
    assert pictures.picture_of("gpu") is None


@pytest.mark.parametrize("kind", RESULTS)
def test_picture(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn as the benchmark ends, and a second time from its JSON."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(harness, "run", lambda *_: None)  # no checkpoint is written
    result, markdown = RESULTS[kind](monkeypatch, tmp_path / "scratch")
    text, out = markdown(result), tmp_path / "out"
    save(out, f"{kind}-small", result, text)
    assert (out / f"{kind}-small.md").read_text() == f"{text}\n\n![{kind}-small]({kind}-small.png)\n"
    picture = out / f"{kind}-small.png"
    assert content(picture) > 8
    assert not overlapping(pictures.PICTURES[kind](json.loads((out / f"{kind}-small.json").read_text())))
    before = picture.read_bytes()
    picture.unlink()
    monkeypatch.setattr(sys, "argv", ["pictures", str(out)])
    capsys.readouterr()
    pictures.main()
    assert capsys.readouterr().out == f"![{kind}-small]({kind}-small.png)\n"
    assert picture.read_bytes() == before


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table says so, and an earlier picture does not stay beside other figures."""
    monkeypatch.setattr("svdconvert.commands.figures.find_spec", lambda name: None)
    (tmp_path / "growth.png").write_bytes(b"earlier")
    save(tmp_path, "growth", {}, "table")
    assert json.loads((tmp_path / "growth.json").read_text()) == {}
    assert not (tmp_path / "growth.png").exists()
    assert "table\n\nNo picture was drawn: drawing needs matplotlib" in (tmp_path / "growth.md").read_text()


def test_what_has_no_picture(tmp_path: Path) -> None:
    save(tmp_path, "gpu", {}, "table")
    assert (tmp_path / "gpu.md").read_text() == "table\n"


def test_overall_figures_are_those_of_the_ratios() -> None:
    """2, 4 and 8 times as fast: 4 in the geometric mean, 2 at least."""
    from .ratios import overall, overall_line

    assert overall_line("linalg.svd", overall([8.0, 2.0, 4.0])) == (
        "Faster than linalg.svd: geometric mean 4.00x, smallest 2.00x."
    )


def test_conversion_takes_turns_and_medians(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both sides once in every round, on the layers in turn; 2 layers of 4 s and 1 s of loading against 2 s."""
    order: list[object] = []

    def ours(source: Path, out: Path, rank: int, workers: int, *more: object) -> dict[str, Any]:
        order.append(workers)
        return convert(source, out, rank, workers) | {"wall_s": [2.0, 9.0, 1.0][len(order) // 3]}

    def theirs(source: Path, rank: int, layers: Sequence[int], device: str) -> dict[str, Any]:
        order.append(list(layers))
        return full_svd()

    monkeypatch.setattr(harness, "run", lambda *_: None)
    for name, made_up in (("convert", ours), ("full_svd", theirs)):
        monkeypatch.setattr(conversion, name, made_up)
    found = conversion.benchmark(TINY, 16, tmp_path, workers=[1, 2], repeats=3)
    assert order == [1, 2, [0], 1, 2, [1], 1, 2, [0]]
    assert found["summary"]["workers 1"]["wall_s"] == 2.0
    assert found["summary"]["workers 1"]["speed_ratio"] == 4.5

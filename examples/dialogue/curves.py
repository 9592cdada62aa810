"""The logged values of a run: a table (CSV) and the loss curves (PNG)."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Terms of a distillation are drawn with the loss they are parts of.
_CURVES = {
    "loss": "training",
    "eval_loss": "evaluation",
    "loss_ce": "soft targets",
    "loss_task": "labels",
    "loss_cos": "cosine",
}


def write_curves(history: Sequence[Mapping[str, Any]], name: str, folder: Path) -> None:
    """Write ``log.csv`` and ``loss.png``.

    Args:
        history: what the Trainer logged, one entry a time.
        name: of the run, for the title.
        folder: where to write.
    """
    entries = [entry for entry in history if any(key in entry for key in _CURVES)]
    if not entries:
        return
    fields = sorted({key for entry in entries for key in entry}, key=lambda key: (key != "step", key))
    with (folder / "log.csv").open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    draw({name: entries}, tuple(_CURVES), folder / "loss.png")


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]], keys: Sequence[str], path: Path) -> None:
    """Draw values over steps.

    Args:
        runs: name -> logged entries.
        keys: what to draw of each.
        path: PNG file.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if len(runs) == 1 else 10, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per token)")
    palette = colormaps["tab10" if len(runs) == 1 else "tab20"]
    axes.set_prop_cycle(color=[palette(i) for i in range(palette.N)])
    for name, entries in runs.items():
        for key in keys:
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                label = _CURVES[key] if len(runs) == 1 else name
                axes.plot(
                    *zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=3
                )
    axes.grid(alpha=0.3)
    if len(runs) == 1:
        axes.legend()
    else:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    if len(runs) == 1:
        axes.set_title(next(iter(runs)))
    FigureCanvasAgg(figure).print_png(path)

"""All figures. matplotlib is an extra (`pip install svdconvert[plots]`), and its global state is left alone."""

from __future__ import annotations

import io
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svdconvert.errors import InputError
from svdconvert.names import layer_number
from svdconvert.storage.disk import atomic_write, disk_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from svdconvert.commands.spectra import MatrixSpectrum, Spectra
    from svdconvert.commands.sweep_book import Sweep

# Told apart by people of any colour vision (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
GREY = "#555555"
_FORMATS = (".png", ".svg", ".pdf")


def need_matplotlib() -> None:
    """See that figures can be drawn, before any work is done for them.

    Raises:
        InputError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise InputError("drawing needs matplotlib; install it with `pip install 'svdconvert[plots]'`")


def check_picture(path: Path) -> None:
    """See that a figure can be written to a file.

    Raises:
        InputError: matplotlib is not installed, or the file's ending or folder will not do.
    """
    need_matplotlib()
    if path.suffix.lower() not in _FORMATS:
        *others, last = _FORMATS
        raise InputError(f"the picture {path} must end in {', '.join(others)} or {last}; rename it")
    if not path.absolute().parent.is_dir():
        raise InputError(f"the picture {path} is in a folder that does not exist; create it first")
    if path.is_dir():
        raise InputError(f"the picture {path} is a folder; give the name of a file")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the name ends in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=160)
    with disk_errors(path.parent):
        atomic_write(path, buffer.getvalue())


def spectrum_figure(spectra: Spectra) -> Figure:
    """Energy against rank: a panel for each kind of matrix, a line for each layer, and where break-even lies."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    kinds = spectra.kinds
    columns = min(len(kinds), 2 if len(kinds) <= 4 else 4)
    lines = -(-len(kinds) // columns)
    figure = empty_figure(4.2 * columns + 1.2, 3.2 * lines + 1.1)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    layers = [layer_number(matrix.module) for matrix in spectra.matrices]
    depth = Normalize(min(layers), max(max(layers), min(layers) + 1))
    # Without the yellow end, which is hard to see on white.
    colours = ListedColormap([colormaps["viridis"](i) for i in range(225)])
    for panel, ((kind, shape), matrices) in zip(panels.flat, kinds.items(), strict=False):
        _energies(panel, kind, shape, matrices, lambda layer: colours(depth(layer)))
    for panel in list(panels.flat)[len(kinds) :]:
        panel.set_axis_off()
    for panel in panels[-1]:
        panel.set_xlabel("share of the ranks")
    for panel in panels[:, 0]:
        panel.set_ylabel("share of the energy")
    if max(layers) > min(layers):
        bar = figure.colorbar(ScalarMappable(depth, colours), ax=panels, label="layer", pad=0.02, aspect=40)
        bar.outline.set_visible(False)
    metrics = "" if spectra.method == "svd" else f", in the metrics of {spectra.method}"
    figure.suptitle(f"{_plain(spectra.model)}{metrics}\n{spectra.headline}", fontsize=11)
    return figure


def _energies(panel: Axes, kind: str, shape: tuple[int, int], matrices: list[MatrixSpectrum], colour: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    from svdconvert.words import percent

    for matrix in matrices:
        size = len(matrix.energies)
        ranks = [rank / size for rank in range(size + 1)]
        panel.plot(ranks, matrix.energy, color=colour(layer_number(matrix.module)), linewidth=1.1)
    first = matrices[0]
    where = first.break_even / len(first.energies)
    panel.axvline(where, color=GREY, linestyle="--", linewidth=1)
    kept = [matrix.break_even_energy for matrix in matrices]
    low, high = percent(min(kept)), percent(max(kept))
    panel.annotate(
        f"break-even keeps\n{low if low == high else f'{low} to {high}'}",
        (where, 0.05),
        xytext=(-6, 0),
        textcoords="offset points",
        ha="right",
        color=GREY,
        fontsize=9,
    )
    panel.set_title(f"{_plain(kind)}  {shape[0]} x {shape[1]}", fontsize=10, loc="left")
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.02)
    panel.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    tidy(panel)


def sweep_figure(sweep: Sweep) -> Figure:
    """Perplexity against parameters: a line for each way to convert, and the dense model."""
    from matplotlib.ticker import EngFormatter, FuncFormatter

    figure = empty_figure(7.6, 5.0)
    panel = figure.subplots()
    for i, (name, points) in enumerate(sweep.lines.items()):
        panel.plot(
            [point.params for point in points],
            [point.perplexity for point in points],
            color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)],
            linestyle="-" if i < len(COLOURS) else "--",
            label=name,
        )
    dense = sweep.dense
    panel.axhline(dense.perplexity, color=GREY, linestyle="--", linewidth=1, label=f"dense, {dense.perplexity:.2f}")
    panel.plot([dense.params], [dense.perplexity], marker="*", markersize=12, color=GREY, linestyle="none")
    highest = max(point.perplexity for point in (*sweep.points, dense))
    if highest > 5 * dense.perplexity:
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.set_xlabel("parameters of the model")
    panel.set_ylabel("perplexity")
    panel.set_title(f"{_plain(sweep.model)}: {_plain(sweep.headline)}", fontsize=11, loc="left")
    panel.legend(frameon=False, fontsize=9)
    tidy(panel)
    return figure


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure in inches, which pyplot knows nothing of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def tidy(panel: Axes) -> None:
    """A light grid behind what is drawn, and no frame where there is no axis."""
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _plain(text: str) -> str:
    """A name that any font has the letters of, and that is not taken for a formula."""
    return text.encode("ascii", "replace").decode().replace("$", r"\$")

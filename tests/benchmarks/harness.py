"""What the benchmarks' command lines, checkpoints and pages have in common; what measures is in ``measure``."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .geometry import MODELS, Geometry, resized
from .measure import ROOT, machine_line, run

BUNDLED = ROOT / "examples" / "tiny_polyglot"


def new_parser(name: str, *, repeats: int = 0, scratch: bool = False, out: bool = True) -> argparse.ArgumentParser:
    """The parser of ``python -m tests.benchmarks.NAME``, for its own options.

    Args:
        name: module.
        repeats: rounds by default; 0 leaves ``--repeats`` out.
        scratch: whether there is ``--scratch``, a folder for checkpoints.
        out: whether ``--out`` is the folder of all benchmarks; otherwise it is what :func:`save_at` takes.
    """
    parser = argparse.ArgumentParser(prog=f"python -m tests.benchmarks.{name}")
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats, help="rounds")
    if scratch:
        parser.add_argument("--scratch", type=Path, help="where to put checkpoints  [default: the temporary folder]")
    if out:
        folder = Path("out/benchmarks")
        parser.add_argument("--out", type=Path, default=folder, help="folder for JSON, Markdown and, if any, PNG")
    else:
        parser.add_argument("--out", type=Path, required=True, help="file name without its ending")
    return parser


def add_sizes(parser: argparse.ArgumentParser, *, layers: int | None = None, vocab: bool = True) -> None:
    """Options for a model of polyglot-ko's family in another size, which :func:`chosen` reads.

    Args:
        parser: gets ``--model`` and ``--hidden``.
        layers: the default of ``--layers``, 0 for as many as the model has; None leaves it out.
        vocab: whether there is ``--vocab``.
    """
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size")
    if layers is not None:
        parser.add_argument("--layers", type=int, default=layers, help="fewer layers than the model has")
    if vocab:
        parser.add_argument("--vocab", type=int, default=0, help="another vocabulary size")


def add_bundled(parser: argparse.ArgumentParser) -> None:
    """``--model``, ``--calib`` and held-out ``--text``, by default the bundled ones."""
    parser.add_argument("--model", type=Path, default=BUNDLED / "model")
    parser.add_argument("--calib", default=str(BUNDLED / "calibration.txt"))
    parser.add_argument("--text", type=Path, default=BUNDLED / "heldout.txt")


def chosen(options: argparse.Namespace) -> Geometry:
    """What the options of :func:`add_sizes` say. ``--layers`` with several values is the benchmark's own affair."""
    sizes = {name: getattr(options, name, 0) for name in ("hidden", "layers", "vocab")}
    return resized(MODELS[options.model], **{name: size for name, size in sizes.items() if isinstance(size, int)})


def write_checkpoint(geometry: Geometry, folder: Path, *more: str) -> Path:
    """Write random weights in a process of its own, since this one must stay small.

    Args:
        geometry: sizes.
        folder: to write.
        more: further options of ``geometry``.
    """
    line = ["tests.benchmarks.geometry", geometry.name, "--out", str(folder), *more]
    for size in ("layers", "hidden", "vocab"):
        line += [f"--{size}", str(getattr(geometry, size))]
    run(line)
    return folder


def add_tokenizer(folder: Path) -> None:
    """Put the bundled model's tokenizer beside random weights."""
    for file in sorted((BUNDLED / "model").glob("*token*.json")):
        shutil.copy(file, folder)


def page(result: Mapping[str, Any], *blocks: str) -> str:
    """A page of Markdown: the blocks, and the machine of the result."""
    return "\n\n".join([*blocks, machine_line(result["machine"])])


def save_at(path: Path, result: Mapping[str, Any], text: str) -> None:
    """Write ``PATH.json`` and ``PATH.md``; print the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)
    print(text)

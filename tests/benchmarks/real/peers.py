"""All matrices rounded alike by another tool's GPTQ, on the same calibration tokens, measured as ``bits.py`` measures.

    python -m venv peers && peers/bin/pip install llmcompressor==0.14.0.1
    python -m tests.benchmarks.real.peers --texts wikitext2 --python peers/bin/python --grids 4,64 3,32

The tool's defaults are left as they are, but for the grid. It reads the sequences in the order that they were counted
in; the matrices that it gives are put into the dense model, and that is measured by this package.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.grids import Grid

from .bits import measure
from .losses import LENGTH, Bench, add_options
from .subjects import SUBJECTS

SCRIPT = Path(__file__).with_name("peer_llm_compressor.py")


def by_peer(bench: Bench, grid: Grid, python: Path, out: Path) -> tuple[float, float | None]:
    """A dense folder with the other tool's matrices; gives the share of their bytes in 16-bit scales."""
    tokens = StatisticsFolder(bench.statistics("empirical")).tokens()
    assert bool(tokens.mask.all()), "the tool is given whole sequences"
    with tempfile.TemporaryDirectory() as temporary:
        given, found = Path(temporary) / "tokens.safetensors", Path(temporary) / "found.safetensors"
        save_file({"ids": tokens.ids.contiguous()}, given)
        command = [python, "-I", SCRIPT.resolve(), bench.model.resolve(), given, found]
        command += ["--bits", str(grid.bits), "--group", str(grid.group)]
        ran = subprocess.run(command, cwd=temporary, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(f"the other tool failed:\n{ran.stderr}")
        with safe_open(found, framework="pt") as file:
            print(", ".join(f"{name} {version}" for name, version in file.metadata().items()), flush=True)
        rounded = load_file(found)
    shapes = [(weight.shape[0], weight.shape[1]) for weight in rounded.values()]
    shutil.copytree(bench.model, out)
    for path in out.glob("*.safetensors"):
        tensors = load_file(path)
        tensors |= {name: rounded.pop(name).to(weight.dtype) for name, weight in tensors.items() if name in rounded}
        save_file(tensors, path, metadata={"format": "pt"})
    assert not rounded, f"not in the model: {', '.join(rounded)}"
    return sum(map(grid.nbytes, shapes)) / sum(2 * rows * columns for rows, columns in shapes), None


def _grid(told: str) -> Grid:
    bits, group = told.split(",")
    return Grid(int(bits), int(group))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.peers")
    add_options(parser)
    parser.add_argument("--python", type=Path, required=True, help="of an environment that has the tool")
    parser.add_argument("--grids", nargs="+", type=_grid, default=[Grid(4, 64), Grid(3, 32)], metavar="BITS,GROUP")
    options = parser.parse_args()
    for name in options.subjects:
        subject = SUBJECTS[name]
        samples = options.samples or subject.calibration
        bench = Bench(subject, options.folder, options.texts, samples, subject.windows)
        print(
            f"{subject.title}, {samples * LENGTH:,} calibration tokens, tested on {bench.passage.tokens:,}", flush=True
        )
        for grid in options.grids:
            measure(bench, f"{grid}, GPTQ of llm-compressor", partial(by_peer, bench, grid, options.python.absolute()))


if __name__ == "__main__":
    main()

"""Peak memory against the number of layers and the size of the files: it must not grow with either.

    python -m tests.benchmarks.memory --hidden 512 --layers 2 8 24

Every conversion is a process of its own, without the self-check (which loads a small result whole); all settings take
turns within each round, medians over the rounds. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .conversion import convert
from .geometry import MODELS, resized
from .harness import new_parser, page, write_checkpoint
from .measure import machine, markdown_table, repeated, save

# Of the files that are read and written when there are to be many.
SMALL_FILE = 20_000_000
# In bytes; a bound on the file size that no model here reaches.
ONE_FILE = 100_000_000_000


def peak(
    scratch: Path, *, hidden: int, layers: int, source_bytes: int, output_bytes: int, vocab: int
) -> dict[str, Any]:
    """Convert a generated checkpoint and say what it took.

    Args:
        scratch: an empty folder.
        hidden, layers, vocab: the model's size.
        source_bytes, output_bytes: limits of the weight files read and written.
    """
    source = scratch / f"{hidden}-{layers}-{source_bytes}"
    if not source.exists():
        geometry = resized(MODELS["1.3b"], hidden=hidden, layers=layers, vocab=vocab)
        write_checkpoint(geometry, source, "--shard-bytes", str(source_bytes))
    options = ["--no-check", "--max-shard-size", str(output_bytes)]
    measured = convert(source, scratch / "factored", hidden // 4, 1, 0, options)
    return {
        "hidden": hidden,
        "layers": layers,
        "source_files": len(list(source.glob("*.safetensors"))),
        "max_output_file": output_bytes,
        "weight_bytes": measured["weight_bytes"],
        "peak_bytes": measured["peak_bytes"],
    }


def benchmark(hidden: int, layers: Sequence[int], vocab: int, repeats: int) -> dict[str, Any]:
    """Every number of layers with one file and with many.

    Args:
        hidden, layers, vocab: the models' sizes.
        repeats: rounds.
    """
    chosen = [(count, limit) for count in layers for limit in (ONE_FILE, SMALL_FILE)]
    found: list[list[dict[str, Any]]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            for runs, (count, limit) in zip(found, chosen, strict=True):
                sizes = {"hidden": hidden, "layers": count, "vocab": vocab}
                runs.append(peak(Path(scratch), **sizes, source_bytes=limit, output_bytes=limit))
    rows = []
    for runs in found:
        peaks = [one["peak_bytes"] for one in runs]
        rows.append(runs[0] | {"peak_bytes": median(peaks), "peaks": peaks})
    return {"machine": machine(), "repeats": repeats, "runs": rows}


def markdown(result: dict[str, Any]) -> str:
    """One line per run."""
    rows = [
        [
            str(run["layers"]),
            str(run["source_files"]),
            f"{run['weight_bytes'] / 1e6:,.1f}",
            "one" if run["max_output_file"] == ONE_FILE else f"up to {run['max_output_file'] / 1e6:.0f} MB each",
            f"{run['peak_bytes'] / 1e6:,.1f}",
        ]
        for run in result["runs"]
    ]
    heads = ["layers", "files read", "MB written", "files written", "peak MB"]
    hidden = result["runs"][0]["hidden"]
    head = f"Peak memory, hidden size {hidden}, one worker, CPU, {repeated(result['repeats'])}"
    return page(result, head, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("memory", repeats=1)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8, 24])
    parser.add_argument("--vocab", type=int, default=4096)
    options = parser.parse_args()
    result = benchmark(options.hidden, options.layers, options.vocab, options.repeats)
    save(options.out, "memory", result, markdown(result))


if __name__ == "__main__":
    main()

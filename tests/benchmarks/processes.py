"""One conversion by one process and by several: seconds, and whether the result is the same.

    python -m tests.benchmarks.processes                              # 1.3B shapes, four layers
    python -m tests.benchmarks.processes --layers 8 --repeats 3

In turn within each round, all on the same checkpoint and without the self-check: one process with one thread; one
process with two threads; one process with two workers of one thread each (``--workers 2``); two processes of torchrun,
one thread each, which talk through gloo. ``seconds`` are the tool's own, from the opened model to the finished folder;
``wall`` is the whole command's, with starting Python, torch and, for the last one, the launcher, which a whole model
does not notice and four layers do. Medians over the rounds. What is written must be the same byte for byte, but for
the times in ``svdconvert.json``, wherever the number of threads is the same; otherwise this fails. (More threads cut
sums in other pieces.) Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from .geometry import Geometry
from .harness import add_sizes, chosen, new_parser, page, write_checkpoint
from .measure import machine, markdown_table, repeated, run, save

ONE = "one process, one worker, one thread"


def ways(count: int) -> Mapping[str, tuple[list[str], list[str], int]]:
    """Name -> what comes before ``svdconvert``, what comes after its options, and OMP_NUM_THREADS.

    Args:
        count: processes, workers or threads.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    return {
        ONE: ([], ["--workers", "1"], 1),
        f"one process, one worker, {count} threads": ([], ["--workers", "1"], count),
        f"one process, {count} workers, one thread each": ([], ["--workers", str(count)], 1),
        f"{count} processes, one thread each": (launcher, ["--workers", "1"], 1),
    }


def digest(folder: Path) -> str:
    """Of all that a conversion has written but ``svdconvert.json``, which holds times."""
    found = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != "svdconvert.json":
            found.update(str(file.relative_to(folder)).encode())
            with file.open("rb") as handle:
                while piece := handle.read(2**20):
                    found.update(piece)
    return found.hexdigest()


def benchmark(geometry: Geometry, rank: int, count: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """All ways, in turn.

    Args:
        geometry: the model.
        rank: of every matrix.
        count: processes, workers and threads.
        repeats: rounds.
        scratch: folder for checkpoints.

    Raises:
        RuntimeError: the results differ.
    """
    source, out = scratch / "source", scratch / "out"
    write_checkpoint(geometry, source)
    chosen = ways(count)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    digests: dict[str, str] = {}
    for _ in range(repeats):
        for name, (before, after, threads) in chosen.items():
            line = [*before, "svdconvert", str(source), "--rank", str(rank), "--out", str(out), "--device", "cpu"]
            measured = run([*line, "--no-check", "--json", *after], threads=threads)
            told = json.loads(measured.output)
            entry = measured.to_json() | {"tool_seconds": told["seconds"]}
            entry.pop("marks")
            runs[name].append(entry)
            digests[name] = digest(out)
            shutil.rmtree(out)
        if len({digests[name] for name, (_, _, threads) in chosen.items() if threads == 1}) > 1:
            raise RuntimeError(f"the results differ: {digests}")
    rows = []
    for name, entries in runs.items():
        middle = {key: median(e[key] for e in entries) for key in ("tool_seconds", "wall_s", "cpu_s", "others")}
        rows.append({"way": name, **middle, "same_bytes": digests[name] == digests[ONE]})
    first = rows[0]
    for row in rows:
        row["faster"] = first["tool_seconds"] / row["tool_seconds"]
        row["faster_wall"] = first["wall_s"] / row["wall_s"]
    return {
        "machine": machine(),
        "model": geometry.name,
        "hidden": geometry.hidden,
        "layers": geometry.layers,
        "rank": rank,
        "repeats": repeats,
        "rows": rows,
        "runs": runs,
    }


def markdown(result: dict[str, Any]) -> str:
    """One line per way."""
    heads = ["way", "seconds", "faster", "wall s", "faster", "CPU s", "same bytes", "others' share"]
    rows = [
        [
            row["way"],
            f"{row['tool_seconds']:.1f}",
            f"{row['faster']:.2f}x",
            f"{row['wall_s']:.1f}",
            f"{row['faster_wall']:.2f}x",
            f"{row['cpu_s']:.1f}",
            "yes" if row["same_bytes"] else "no",
            f"{row['others']:.0%}",
        ]
        for row in result["rows"]
    ]
    title = (
        f"{result['layers']} layers of {result['model']}, hidden size {result['hidden']}, rank {result['rank']}; "
        f"faster than {ONE}; {repeated(result['repeats'])}"
    )
    return page(result, title, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("processes", repeats=1, scratch=True)
    add_sizes(parser, layers=4)
    parser.add_argument("--rank", type=int, default=0, help="default: a quarter of the hidden size")
    parser.add_argument("--count", type=int, default=2, help="processes, workers or threads")
    options = parser.parse_args()
    geometry = chosen(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rank = options.rank or geometry.hidden // 4
        result = benchmark(geometry, rank, options.count, options.repeats, Path(scratch))
    save(options.out, "processes", result, markdown(result))


if __name__ == "__main__":
    main()

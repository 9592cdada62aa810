"""A whole conversion by the command line, against the whole-model full-SVD way.

    python -m tests.benchmarks.conversion                                  # 1.3B at rank 512
    python -m tests.benchmarks.conversion --model 3.8b --workers 1
    python -m tests.benchmarks.conversion --model 1.3b --workers 1 2 --repeats 3
    python -m tests.benchmarks.conversion --model 3.8b --device cuda --sampled-layers 2

Generates the checkpoint (see ``geometry``), converts it in a process of its own, and in turn with it runs the full
SVD on a sample of the same model's layers, also in its own process, so that both meet the same load. Every round takes
other layers. The full SVD's total is extrapolated: its seconds per layer times the layers, plus loading. Medians over
the rounds. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .geometry import SPECTRA, Geometry
from .harness import add_sizes, chosen, new_parser, write_checkpoint
from .measure import Measured, machine, machine_line, markdown_table, repeated, run, save

RANKS = {"1.3b": 512, "3.8b": 768, "5.8b": 1024, "12.8b": 1280}
# Said of every weight file when it is complete, so last of all before the self-check and what that imports.
WROTE = "wrote model"


def convert(
    source: Path, out: Path, rank: int, workers: int, threads: int, options: Sequence[str], device: str = "cpu"
) -> dict[str, Any]:
    """Convert and measure.

    Args:
        source: dense checkpoint.
        out: folder to write; removed before and after.
        rank: of every matrix.
        workers: ``--workers``.
        threads: OMP_NUM_THREADS, 0 for the default.
        options: further options of the command line.
        device: ``--device``.
    """
    shutil.rmtree(out, ignore_errors=True)
    command = ["svdconvert", str(source), "--rank", str(rank), "--out", str(out), "--device", device, "--json"]
    command += ["--workers", str(workers), *options]
    measured = run(command, threads=threads, marks=[WROTE])
    report = json.loads(measured.output)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    record = json.loads((out / "svdconvert.json").read_text())
    shutil.rmtree(out)
    matrices = record["matrices"].values()
    result = measured.to_json() | {
        "workers": workers,
        "threads": threads,
        "tool_seconds": report["seconds"],
        "tool_peak_bytes": report["peak_memory_bytes"],
        "peak_device_bytes": report["peak_device_bytes"],
        # Before the self-check, for which transformers is imported and the result run block by block.
        "conversion_peak_bytes": measured.marks.get(WROTE) or measured.peak_bytes,
        "solver_s": round(sum(matrix["seconds"] for matrix in matrices), 2),
        "solver_s_by_kind": _by_kind({name: m["seconds"] for name, m in record["matrices"].items()}),
        "precisions": sorted({matrix["precision"] for matrix in matrices}),
        "relative_error": {
            "mean": sum(matrix["relative_error"] for matrix in matrices) / len(matrices),
            "worst": max(matrix["relative_error"] for matrix in matrices),
        },
        "excess_worst": max(m["relative_error"] / m["optimal_error"] - 1 for m in matrices if m["optimal_error"]),
        "params": record["params"],
        "weight_bytes": written,
        "checks": report["checks"],
    }
    result.pop("marks")
    return result


def full_svd(source: Path, rank: int, layers: Sequence[int], device: str = "cpu") -> dict[str, Any]:
    """Run the baseline on some layers and measure."""
    arguments = ["tests.benchmarks.baseline", str(source), "--rank", str(rank), "--layers", *map(str, layers)]
    measured: Measured = run([*arguments, "--device", device])
    found = json.loads(measured.output)
    seconds = {name: matrix["seconds"] for name, matrix in found["matrices"].items()}
    cpu = sum(matrix["cpu_seconds"] for matrix in found["matrices"].values())
    result = measured.to_json() | {
        "loading_s": found["loading_s"],
        "threads": found["threads"],
        "peak_device_bytes": found["peak_device_bytes"],
        "layer_s": sum(seconds.values()) / len(layers),
        "layer_cpu_s": cpu / len(layers),
        "svd_s_by_kind": _by_kind(seconds),
    }
    result.pop("marks")
    return result


def _by_kind(seconds: dict[str, float]) -> dict[str, float]:
    """Median by kind of layer."""
    kinds: dict[str, list[float]] = {}
    for name, value in seconds.items():
        kinds.setdefault(name.split(".", 2)[2], []).append(value)
    return {kind: round(median(values), 3) for kind, values in kinds.items()}


def benchmark(
    geometry: Geometry,
    rank: int,
    scratch: Path,
    *,
    source: Path | None = None,
    spectrum: str = "llm",
    workers: Sequence[int] = (1,),
    repeats: int = 1,
    sampled: int = 1,
    options: Sequence[str] = (),
    device: str = "cpu",
) -> dict[str, Any]:
    """Everything, in turns.

    Args:
        geometry: the model.
        rank: of every matrix.
        scratch: folder for checkpoints; what is written there is removed.
        source: an existing checkpoint of this geometry to use instead of a new one; kept.
        spectrum: see ``geometry``.
        workers: values of ``--workers`` to try. More than one gets the cores shared out among them.
        repeats: rounds.
        sampled: layers that the full SVD does in each round; 0 leaves it out.
        options: further options for the conversion.
        device: what computes, for both.
    """
    folder = source or scratch / "source"
    if source is None:
        write_checkpoint(geometry, folder, "--spectrum", spectrum)
    cores = os.cpu_count() or 1
    ours: dict[int, list[dict[str, Any]]] = {count: [] for count in workers}
    theirs = []
    try:
        for turn in range(repeats):
            for count in workers:
                threads = 0 if count == 1 else max(cores // count, 1)
                ours[count].append(convert(folder, scratch / "factored", rank, count, threads, options, device))
            if sampled:
                step = max(geometry.layers // sampled, 1)
                layers = [(turn + i * step) % geometry.layers for i in range(sampled)]
                theirs.append(full_svd(folder, rank, layers, device))
    finally:
        if source is None:
            shutil.rmtree(folder, ignore_errors=True)
    return {
        "model": geometry.name,
        "hidden": geometry.hidden,
        "layers": geometry.layers,
        "rank": rank,
        "spectrum": spectrum,
        "device": device,
        "repeats": repeats,
        "machine": machine(),
        "conversions": {str(count): runs for count, runs in ours.items()},
        "full_svd": theirs,
        "summary": summary(ours, theirs, geometry.layers),
    }


def summary(
    ours: dict[int, list[dict[str, Any]]], theirs: Sequence[dict[str, Any]], layers: int
) -> dict[str, dict[str, Any]]:
    """Medians and ratios per number of workers."""
    result = {}
    if theirs:
        svd = median(run["layer_s"] for run in theirs) * layers
        svd_cpu = median(run["layer_cpu_s"] for run in theirs) * layers
        loading = median(run["loading_s"] for run in theirs)
        peak = median(run["peak_bytes"] for run in theirs)
        result["full_svd"] = {
            "total_s": round(svd + loading, 1),
            "svd_s": round(svd, 1),
            "svd_cpu_s": round(svd_cpu, 1),
            "loading_s": round(loading, 1),
            "peak_bytes": peak,
        }
    for count, runs in ours.items():
        row = {
            key: median(run[key] for run in runs)
            for key in ("wall_s", "cpu_s", "system_s", "solver_s", "conversion_peak_bytes", "peak_bytes", "others")
        }
        if theirs:
            row["speed_ratio"] = round((svd + loading) / row["wall_s"], 2)
            row["cpu_ratio"] = round(svd_cpu / row["cpu_s"], 2)
            row["memory_ratio"] = round(peak / row["conversion_peak_bytes"], 2)
        result[f"workers {count}"] = row
    return result


def markdown(result: dict[str, Any]) -> str:
    """The summary as a table."""
    rows = []
    for name, row in result["summary"].items():
        if name == "full_svd":
            label = "full SVD, whole model in memory (extrapolated)"
            seconds, cpu, peak = row["total_s"], row["svd_cpu_s"], row["peak_bytes"]
            rows.append([label, f"{seconds:.0f}", f"{cpu:.0f}", "", f"{peak / 1e6:,.0f}", *[""] * 4])
            continue
        line = [f"svdconvert, {name}", *(f"{row[key]:.1f}" for key in ("wall_s", "cpu_s", "solver_s"))]
        line += [f"{row[key] / 1e6:,.0f}" for key in ("conversion_peak_bytes", "peak_bytes")]
        line += [f"{row[key]:.1f}x" if key in row else "" for key in ("speed_ratio", "cpu_ratio", "memory_ratio")]
        rows.append(line)
    heads = ["way", "wall s", "CPU s", "solver s", "peak MB", "with check", "wall", "CPU", "memory"]
    first = next(iter(result["conversions"].values()))[0]
    checks = "; ".join(first["checks"]) or "none asked for"
    others = [f"{run['others']:.0%}" for runs in result["conversions"].values() for run in runs]
    title = f"polyglot-ko-{result['model']} geometry ({result['layers']} layers of {result['hidden']})"
    rounds = f"{repeated(result['repeats'])}, in turn"
    return "\n".join(
        [
            f"{title}, rank {result['rank']}, spectrum {result['spectrum']}; {rounds}",
            "",
            markdown_table(heads, rows),
            "",
            f"Parameters {first['params']['before']:,} -> {first['params']['after']:,}; "
            f"{first['read_bytes'] / 1e9:.2f} GB read, {first['written_bytes'] / 1e9:.2f} GB written; "
            f"relative error mean {first['relative_error']['mean']:.4f}, worst {first['relative_error']['worst']:.4f}, "
            f"at most {first['excess_worst']:.1e} above the optimum; solved in {', '.join(first['precisions'])}.",
            f"Self-check: {checks}.",
            "The last three columns are the full SVD's figure over ours. Share of the machine taken by other processes "
            f"during the conversions: {', '.join(others)}.",
            machine_line(result["machine"]),
        ]
    )


def main() -> None:
    """Command line."""
    parser = new_parser("conversion", repeats=1, scratch=True)
    add_sizes(parser, layers=0)
    parser.add_argument("--rank", type=int, default=0, help="default: a quarter of the hidden size")
    parser.add_argument("--spectrum", choices=SPECTRA, default="llm")
    parser.add_argument("--workers", type=int, nargs="+", default=[1], help="one or more values to compare")
    parser.add_argument("--sampled-layers", type=int, default=1, help="layers of the full SVD per round; 0: none")
    parser.add_argument("--device", default="cpu", help="what computes: cpu, cuda or cuda:N")
    parser.add_argument("--no-check", action="store_true", help="convert without the self-check")
    parser.add_argument("--source", type=Path, help="a checkpoint that `geometry` wrote, instead of a new one")
    options = parser.parse_args()
    geometry = chosen(options)
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        result = benchmark(
            geometry,
            options.rank or (RANKS[options.model] if not options.hidden else options.hidden // 4),
            Path(scratch),
            source=options.source,
            spectrum=options.spectrum,
            workers=options.workers,
            repeats=options.repeats,
            sampled=options.sampled_layers,
            options=["--no-check"] if options.no_check else [],
            device=options.device,
        )
    save(options.out, f"conversion-{options.model}", result, markdown(result))


if __name__ == "__main__":
    main()

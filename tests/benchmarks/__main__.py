"""All benchmarks, one after the other, each in a process of its own.

    python -m tests.benchmarks              # about two hours on two idle cores, 12 GB of disk
    python -m tests.benchmarks --quick      # small sizes: whether everything runs, in minutes
    python -m tests.benchmarks --only solver-llm growth

What is for a GPU is a command by itself, ``python -m tests.benchmarks.gpu``. Each writes JSON, Markdown and a picture;
tables and pictures are put together in ``benchmarks.md``, with versions and machine once. One that fails does not keep
the others from running.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .measure import ROOT, machine, machine_line

# Name of what is written -> module and options, in full and in small.
ALL: Mapping[str, tuple[str, Sequence[str], Sequence[str]]] = {
    "solver-llm": (
        "solver",
        ["--models", "1.3b", "3.8b"],
        ["--models", "1.3b", "--repeats", "1", "--skip", "svd_lowrank", "--hidden", "256"],
    ),
    "filtered": ("filtered", ["--hidden", "2048"], ["--hidden", "256", "--ranks", "16", "0", "--repeats", "1"]),
    "metrics-one": ("metrics", ["--repeats", "3"], ["--hidden", "256"]),
    "metrics-two": ("metrics", ["--sides", "two", "--repeats", "3"], ["--sides", "two", "--hidden", "256"]),
    "memory": ("memory", ["--repeats", "3"], ["--hidden", "128", "--layers", "2", "4"]),
    "calibration-1.3b-kfac": (
        "calibration",
        ["--layers", "4", "--repeats", "3"],
        ["--hidden", "128", "--vocab", "1024", "--tokens", "1024", "--length", "128", "--layers", "1", "2"],
    ),
    "growth": (
        "growth",
        ["--repeats", "3"],
        ["--layers", "2", "4", "--hidden", "128", "256", "--rank", "32", "64"],
    ),
    "inference-1.3b": (
        "inference",
        ["--layers", "4", "--compile", "--repeats", "5"],
        "--hidden 256 --vocab 1024 --prompt 32 --tokens 4 --train-steps 1 --repeats 1".split(),
    ),
    "inference-llama-1.1b": (
        "inference",
        ["--model", "llama-1.1b", "--layers", "4", "--train-steps", "0", "--repeats", "5"],
        "--model llama-1.1b --hidden 256 --vocab 1024 --prompt 32 --tokens 4 --train-steps 0 --repeats 1".split(),
    ),
    "latent-cache-1.3b": (
        "latent_cache",
        [],
        ["--hidden", "256", "--tokens", "127", "--repeats", "3"],
    ),
    "processes": (
        "processes",
        ["--repeats", "3"],
        ["--layers", "2", "--hidden", "256", "--vocab", "1024"],
    ),
    "conversion-1.3b": (
        "conversion",
        ["--workers", "1", "2", "--repeats", "3"],
        ["--layers", "2", "--hidden", "256", "--vocab", "1024", "--workers", "1", "2"],
    ),
    # Two rounds, since one takes ten minutes.
    "conversion-3.8b": (
        "conversion",
        ["--model", "3.8b", "--workers", "1", "2", "--repeats", "2"],
        ["--model", "3.8b", "--layers", "2", "--hidden", "384", "--vocab", "1024", "--repeats", "2"],
    ),
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--only", nargs="+", choices=ALL, default=list(ALL))
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder for JSON, Markdown and PNG")
    options = parser.parse_args()
    out, failed, tables = options.out.resolve(), [], []
    where = machine_line(machine())
    print(where)
    for name in options.only:
        module, full, small = ALL[name]
        line = [sys.executable, "-m", f"tests.benchmarks.{module}", *(small if options.quick else full)]
        print(f"\n## {name}: {' '.join(line[1:])}\n", flush=True)
        if subprocess.run([*line, "--out", str(out)], cwd=ROOT, check=False).returncode:
            failed.append(name)
            continue
        # Each says the machine for itself, which is the same for all.
        table = (out / f"{name}.md").read_text().replace(f"{where}\n", "")
        tables.append(f"## {name}\n\n    {' '.join(['python', *line[1:]])}\n\n{table}")
    if tables:
        (out / "benchmarks.md").write_text("\n".join(["# Benchmarks", "", where, "", *tables]))
        print(f"\nall tables and pictures: {options.out / 'benchmarks.md'}")
    if failed:
        sys.exit(f"these failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

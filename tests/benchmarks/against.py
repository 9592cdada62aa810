"""This version against another commit: whether both write the same bytes, and what each costs.

    python -m tests.benchmarks.against 53a5e07
    python -m tests.benchmarks.against main --models bundled --only svd pivoted --repeats 1

The other commit is unpacked into a temporary folder and runs there, in the same environment. Both versions run every
setting in turn, and the one that begins changes from round to round. A setting is a process of its own with one thread
and one worker; its cost is the CPU time, user and system, of that process and its children. The bundled model takes
seconds, most of them to start Python and torch, so a ratio of it says little about the solver; ``large`` is a random
model of four layers at hidden size 1,024, written once.

The weight and statistics files (``*.safetensors``) of both versions are compared by SHA-256. Exits with 1 if one
differs. Writes JSON and Markdown.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from .geometry import MODELS, resized
from .harness import BUNDLED, add_tokenizer, new_parser, write_checkpoint
from .measure import ROOT, machine, machine_line, markdown_table, repeated, run, save

THIS, OTHER = "this", "other"
_CONVERT = "{model} --out {out} --device cpu --workers 1 --no-check"
_CALIB = "--calib {text} --calib-samples 16 --calib-length 64"

# Name -> what follows `python -m svdconvert`. {out} is the setting's own folder, {folder} the one above it, where those
# of earlier settings lie.
SETTINGS: Mapping[str, Mapping[str, str]] = {
    "bundled": {
        "svd": f"{_CONVERT} --rank 24",
        "bfloat16": f"{_CONVERT} --rank 24 --dtype bfloat16",
        "pivoted": f"{_CONVERT} --keep 0.5 --dtype float32 --layout pivoted",
        "shared": f"{_CONVERT} --keep 0.5 --share-layers 2",
        "split": f"{_CONVERT} --keep 0.5 --split-fused --layout pivoted",
        "fast": f"{_CONVERT} --rank 4 --solver fast",
        "kfac": f"{_CONVERT} --keep 0.6 {_CALIB} --layout pivoted --work {{folder}}/work",
        "uniform": f"{_CONVERT} --keep 0.6 {_CALIB} --allocation uniform --work {{folder}}/work",
        "whiten": f"{_CONVERT} --keep 0.6 {_CALIB} --method whiten --refit sequential",
        "asvd": f"{_CONVERT} --keep 0.6 {_CALIB} --method asvd",
        "fwsvd": f"{_CONVERT} --keep 0.6 {_CALIB} --method fwsvd",
        "refit": f"{_CONVERT} --keep 0.6 {_CALIB} --refit sequential --share-layers 1 --split-fused",
        "shared-kfac": f"{_CONVERT} --keep 0.6 {_CALIB} --share-layers 2",
        "calibrate": f"calibrate {{model}} {_CALIB} --out {{out}} --device cpu",
        "stats": f"{_CONVERT} --keep 0.7 --stats {{folder}}/calibrate",
        "densify": "densify {folder}/pivoted --out {out}",
    },
    "large": {
        "svd": f"{_CONVERT} --keep 0.5",
        "fast": f"{_CONVERT} --rank 64 --solver fast",
        "calibrate": "calibrate {model} --calib {text} --calib-samples 16 --calib-length 256 --out {out} --device cpu",
        "stats": f"{_CONVERT} --keep 0.5 --layout pivoted --stats {{folder}}/calibrate",
    },
}
# What a setting reads of another one's results.
_AFTER = {"stats": "calibrate", "densify": "pivoted"}


def unpack(commit: str, folder: Path, root: Path) -> str:
    """Write a commit's files into an empty folder.

    Returns:
        The commit's full name.

    Raises:
        RuntimeError: git does not know the commit.
    """
    found = subprocess.run(
        ["git", "rev-parse", "--verify", f"{commit}^{{commit}}"], cwd=root, capture_output=True, text=True, check=False
    )
    if found.returncode:
        raise RuntimeError(f"{commit} is no commit of this repository: {found.stderr.strip()}")
    name = found.stdout.strip()
    archive = subprocess.Popen(["git", "archive", name], cwd=root, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    if archive.wait():
        raise RuntimeError(f"git archive {name} failed")
    return name


def write_large(folder: Path) -> None:
    """A random model of four layers at hidden size 1,024 with the bundled model's tokenizer."""
    write_checkpoint(resized(MODELS["1.3b"], layers=4, hidden=1024, vocab=4016), folder)
    add_tokenizer(folder)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight and statistics file below a folder, by its path in there."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while piece := handle.read(2**20):
                digest.update(piece)
        found[str(file.relative_to(folder))] = digest.hexdigest()
    return found


def differences(this: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """A sentence for every file that is not the same on both sides."""
    lines = []
    for name in sorted({*this, *other}):
        if name not in other:
            lines.append(f"{name} is written by this version only")
        elif name not in this:
            lines.append(f"{name} is written by the other version only")
        elif this[name] != other[name]:
            lines.append(f"{name} differs")
    return lines


def cost(this: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """CPU seconds of both, round by round, as one line.

    Returns:
        Medians of both, and of the rounds' own ratios (this over other) median, lowest and highest.
    """
    ratios = [one / two for one, two in zip(this, other, strict=True)]
    return {
        THIS: median(this),
        OTHER: median(other),
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def with_sources(only: Sequence[str], settings: Mapping[str, str]) -> list[str]:
    """The chosen settings, and those whose results they read; all where none is chosen."""
    wanted = set(only or settings)
    wanted |= {_AFTER[name] for name in wanted if name in _AFTER}
    return [name for name in settings if name in wanted]


def compare(
    roots: Mapping[str, Path], settings: Mapping[str, str], inputs: Mapping[str, Path], repeats: int, scratch: Path
) -> list[dict[str, Any]]:
    """Run every setting with both versions in turn.

    Args:
        roots: the two checkouts, by :data:`THIS` and :data:`OTHER`.
        settings: see :data:`SETTINGS`.
        inputs: ``model`` and ``text``.
        repeats: rounds.
        scratch: folder for results; emptied before every round.

    Returns:
        For every setting its name, how many files it wrote, what differs in any round, and :func:`cost` of it.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {side: [] for side in roots} for name in settings}
    differ: dict[str, dict[str, None]] = {name: {} for name in settings}
    files = dict.fromkeys(settings, 0)
    for turn in range(repeats):
        known: set[str] = set()
        folders = {side: scratch / side for side in roots}
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name, arguments in settings.items():
            for side in (THIS, OTHER) if turn % 2 == 0 else (OTHER, THIS):
                places = {**inputs, "folder": folders[side], "out": folders[side] / name}
                line = [word.format(**places) for word in arguments.split()]
                seconds[name][side].append(run(["svdconvert", *line], threads=1, root=roots[side]).cpu)
            found = {side: digests(folder) for side, folder in folders.items()}
            files[name] = sum(file.startswith(f"{name}/") for file in found[THIS])
            # The whole folder, for what a setting leaves in --work; and each difference once.
            lines = differences(found[THIS], found[OTHER])
            differ[name] |= dict.fromkeys(line for line in lines if line not in known)
            known |= set(lines)
    return [
        {"setting": name, "files": files[name], "differ": list(differ[name]), **cost(*seconds[name].values())}
        | {"seconds": seconds[name]}
        for name in settings
    ]


def benchmark(
    commit: str, models: Sequence[str], only: Sequence[str], repeats: int, scratch: Path, root: Path
) -> dict[str, Any]:
    """All models.

    Args:
        commit: the other version.
        models: keys of :data:`SETTINGS`.
        only: names of settings; none for all.
        repeats: rounds.
        scratch: an empty folder.
        root: this version.
    """
    roots = {THIS: root, OTHER: scratch / "checkout"}
    roots[OTHER].mkdir()
    result: dict[str, Any] = {"machine": machine(), "commit": unpack(commit, roots[OTHER], root), "repeats": repeats}
    result["models"] = {}
    for model in models:
        chosen = {name: SETTINGS[model][name] for name in with_sources(only, SETTINGS[model])}
        inputs = {"model": BUNDLED / "model", "text": BUNDLED / "calibration.txt"}
        if model == "large":
            inputs["model"] = scratch / "large"
            write_large(inputs["model"])
        rows = compare(roots, chosen, inputs, repeats, scratch)
        totals = {side: [sum(row["seconds"][side][turn] for row in rows) for turn in range(repeats)] for side in roots}
        result["models"][model] = {"rows": rows, "all": cost(totals[THIS], totals[OTHER])}
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each model, and a line for each difference."""
    head = f"This version against {result['commit'][:7]}: CPU seconds of one thread, {repeated(result['repeats'])}"
    lines = [f"{head}; ratio: this over other, median of the rounds, lowest and highest in brackets", ""]
    for model, found in result["models"].items():
        rows = [
            [row["setting"], str(row["files"]), "no" if row["differ"] else "yes", *_cost(row)] for row in found["rows"]
        ]
        rows.append(["all", str(sum(row["files"] for row in found["rows"])), "", *_cost(found["all"])])
        heads = [f"{model} model", "files", "same bytes", "this", "other", "ratio"]
        lines += [markdown_table(heads, rows), ""]
        lines += [f"- {row['setting']}: {line}" for row in found["rows"] for line in row["differ"]]
    return "\n".join([*lines, machine_line(result["machine"])])


def _cost(row: Mapping[str, float]) -> list[str]:
    spread = f"{row['ratio']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
    return [f"{row[THIS]:.2f}", f"{row[OTHER]:.2f}", spread]


def main() -> None:
    """Command line."""
    parser = new_parser("against", repeats=3, scratch=True)
    parser.add_argument("commit", help="the other version: a commit, a branch or a tag")
    parser.add_argument("--models", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    names = list(dict.fromkeys(name for settings in SETTINGS.values() for name in settings))
    parser.add_argument("--only", nargs="+", choices=names, default=[], help="some of the settings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        try:
            folder = Path(scratch).resolve()
            result = benchmark(options.commit, options.models, options.only, options.repeats, folder, ROOT)
        except RuntimeError as error:
            sys.exit(str(error))
    save(options.out, "against", result, markdown(result))
    if any(row["differ"] for found in result["models"].values() for row in found["rows"]):
        sys.exit(1)


if __name__ == "__main__":
    main()

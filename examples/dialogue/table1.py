"""The paper's Table 1 and what it did not have: `python -m examples.dialogue.table1 --config FILE`.

Each row is converted, trained, asked and scored; a row that is done stays done, and a killed one goes on where it was.
Training and answering run in processes of their own, so that their memory is their own. The page is written anew after
every row: Markdown, HTML, plots and a JSON of all figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from examples.dialogue.commands import SETTINGS, Command
from svdconvert.errors import InputError, JobError

if TYPE_CHECKING:
    from examples.dialogue.experiment import Experiment, Row

# By default glibc maps every large tensor anew; where page faults are dear, training on the CPU takes several times as
# long. Read when a process starts.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 33), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}


@click.command(cls=Command, context_settings=SETTINGS)
@click.option("--config", required=True, type=click.Path(path_type=Path), help="File of the table (TOML).")
@click.option("--rows", help="Only these rows, their names with commas between, and those they start from.")
@click.option("--page", type=click.Path(path_type=Path), help="Folder of the page, in place of the file's.")
@click.option("--page-only", is_flag=True, help="Write the page from the rows that are done, and stop.")
def main(config: Path, rows: str | None, page: Path | None, page_only: bool) -> None:
    """Fill a table of training runs."""
    from examples.dialogue.experiment import read_experiment
    from examples.dialogue.page import remark, write_page

    experiment = read_experiment(config)
    wanted = _chosen(experiment, rows)
    for text in experiment.remarks:
        remark(experiment, {}, text)  # a mistake is told before the first row
    target = page or experiment.page
    command = f"python -m examples.dialogue.table1 --config {_shown(config)}"
    if not page_only:
        for row in wanted:
            fill(experiment, row)
            write_page(experiment, results(experiment), target, command)
    write_page(experiment, results(experiment), target, command)
    click.echo(f"{target / 'README.md'}")


def fill(experiment: Experiment, row: Row) -> dict[str, Any]:
    """Do a row, or what is left of it, and keep its result.

    Args:
        experiment: the table.
        row: one of its rows.

    Raises:
        InputError: its settings cannot be used.
        JobError: it broke off; the same call continues it.
    """
    done = _result_file(experiment, row)
    if done.is_file():
        found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
        return found
    click.echo(f"-- {row.name}")
    done.parent.mkdir(parents=True, exist_ok=True)
    with _seconds(done.with_name(f"{row.name}.seconds")) as seconds:
        result = _filled(experiment, row)
    result["seconds"] = round(seconds(), 1)
    partial = done.with_name(done.name + ".writing")
    partial.write_text(json.dumps(result, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    partial.replace(done)
    return result


def _filled(experiment: Experiment, row: Row) -> dict[str, Any]:
    python = [sys.executable] if not experiment.launcher else list(experiment.launcher)
    _call([*python, "-m", "examples.dialogue.train", "--config", str(row.config)], row.name, experiment.threads)
    result: dict[str, Any] = {"name": row.name, "table": row.table, "bits": row.bits, "run": _run(row)}
    if row.evaluated:
        predictions = experiment.work / "predictions" / f"{row.name}.jsonl"
        arguments = ["--decoding", json.dumps(dict(experiment.decoding)), "--batch-size", str(experiment.batch_size)]
        arguments += ["--limit", str(experiment.limit)]
        arguments += ["--bits", str(row.bits)] if row.bits else []
        arguments += ["--start"] if row.start else []
        arguments += ["--weights", experiment.weights] if experiment.weights else []
        reference = experiment.references.get(row.table, row.name)
        if reference != row.name:
            against = next(one for one in experiment.rows if one.name == reference)
            arguments += ["--against", str(against.config)]
        module = [sys.executable, "-m", "examples.dialogue.answer", "--config", str(row.config)]
        _call([*module, "--out", str(predictions), *arguments], row.name, experiment.threads)
        result |= _scored(experiment, row, predictions)
    return result


@contextmanager
def _seconds(kept: Path) -> Iterator[Callable[[], float]]:
    """Time spent on a row, that of calls that broke off included; only what a killed one spent is lost."""
    before = float(kept.read_text(encoding="ascii")) if kept.is_file() else 0.0
    clock = time.perf_counter()

    def seconds() -> float:
        return before + time.perf_counter() - clock

    try:
        yield seconds
    except BaseException:
        kept.write_text(f"{seconds():.1f}", encoding="ascii")
        raise
    kept.unlink(missing_ok=True)


def results(experiment: Experiment) -> dict[str, dict[str, Any]]:
    """Results of the rows that are done, by name."""
    files = {row.name: _result_file(experiment, row) for row in experiment.rows}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}


def _chosen(experiment: Experiment, names: str | None) -> Sequence[Row]:
    if names is None:
        return experiment.rows
    known = {row.name: row for row in experiment.rows}
    wanted = [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in known:
            raise InputError(f"there is no row {name!r}; the table has {', '.join(known)}")
    return [known[name] for name in wanted]


def _result_file(experiment: Experiment, row: Row) -> Path:
    return experiment.work / "results" / f"{row.name}.json"


def _call(words: Sequence[str], name: str, threads: int) -> None:
    """Run a command of this example; its own message has been printed when it fails."""
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**_ALLOCATOR, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    if threads:
        environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    try:
        code = subprocess.run(words, env=environment, check=False).returncode
    except OSError as error:
        raise InputError(f"{words[0]} cannot be started ({error.strerror}); see launcher in the table's file") from None
    if code == 2:
        raise InputError(f"row {name} cannot be done, see above")
    if code:
        raise JobError(f"row {name} broke off, see above; the same command goes on there")


def _run(row: Row) -> dict[str, Any]:
    """What the page needs of a training report."""
    from svdconvert.storage.opening import open_source
    from svdconvert.tensors import parameters

    folder = Path(row.settings.output)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    kept = (
        "rows",
        "tokens",
        "steps",
        "warmup",
        "evaluation_every",
        "memory",
        "training_seconds",
        "device",
        "eval_loss",
        "processes",
        "versions",
        "speech",
        "dropped",
    )
    found = {key: report[key] for key in kept}
    found["curve"] = [
        {"step": entry["step"], "eval_loss": entry["eval_loss"]} for entry in report["history"] if "eval_loss" in entry
    ]
    # what a run started from may be what another one has factored and trained
    source = Path(report["source"])
    while (earlier := source.parent / "report.json").is_file():
        source = Path(json.loads(earlier.read_text(encoding="utf-8"))["source"])
    for name, path in (("source", source), ("start", report["start"])):
        found[f"{name}_parameters"] = parameters(list(open_source(str(path), None).tensors.values()))
    return found


def _scored(experiment: Experiment, row: Row, predictions: Path) -> dict[str, Any]:
    from examples.dialogue.answer import STATISTICS
    from examples.dialogue.evaluation import evaluate
    from examples.dialogue.predictions import pair, read_predictions
    from examples.dialogue.schema import read_jsonl

    samples, _ = read_jsonl(row.settings.data.validation)
    _, answers = read_predictions(predictions)
    scores = evaluate(*pair(answers, samples, partial=True), experiment.profile)
    statistics = predictions.with_name(predictions.name + STATISTICS)
    asked = [sample for sample in samples if sample.id in answers][: experiment.examples]
    return {
        "scores": scores.to_json(),
        "statistics": json.loads(statistics.read_text(encoding="utf-8")),
        "examples": [{"question": one.question, "reference": one.answer, "answer": answers[one.id]} for one in asked],
    }


def _shown(config: Path) -> str:
    """The path as a reader of the page would type it."""
    root = Path(__file__).resolve().parents[2]
    try:
        return str(config.resolve().relative_to(root))
    except ValueError:
        return config.name


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.table1")

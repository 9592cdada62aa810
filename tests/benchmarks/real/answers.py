"""Questions of BIG-bench, asked of the dense and the factored subjects by lm-evaluation-harness.

    pip install "svdconvert[harness]"
    python -m tests.benchmarks.real.answers --texts wikitext2

The factored model is that of one row and budget of the table of losses, by default the best at 80 %. Goes into the same
file as the losses: accuracy, its standard error, and what is left of the dense model's accuracy above chance.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import book
from .losses import Bench, add_options
from .questions import TASKS, questions
from .rows import ROWS
from .subjects import SUBJECTS

HERE = Path(__file__).parent / "harness"


def accuracies(model: Path, questions_folder: Path, tasks: list[str], batch: int) -> dict[str, tuple[float, float]]:
    """Task -> accuracy and its standard error, by the harness in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # The tasks name files of the default folder, relative to where the harness runs.
        shutil.copytree(questions_folder, folder / ".cache/real/questions", ignore=shutil.ignore_patterns("*.tar.gz"))
        line = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", str(batch)]
        line += ["--model_args", f"pretrained={model.resolve()},trust_remote_code=True,dtype=float32"]
        line += ["--include_path", str(HERE), "--tasks", ",".join(f"bigbench_{name}" for name in tasks)]
        environment = {
            **os.environ,
            "HF_DATASETS_OFFLINE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "cache"),
        }
        subprocess.run([*line, "--output_path", str(folder / "it.json")], cwd=folder, env=environment, check=True)
        (path,) = folder.glob("it*.json")
        results = json.loads(path.read_text())["results"]
    found = {name: results[f"bigbench_{name}"] for name in tasks}
    return {name: (each["acc,none"], each["acc_stderr,none"]) for name, each in found.items()}


def ask(options: argparse.Namespace) -> None:
    """Ask both models of every subject."""
    asked = questions(options.folder / "questions", options.rows)
    chance = {name: sum(1 / len(each["choices"]) for each in lines) / len(lines) for name, lines in asked.items()}
    (row,) = (row for row in ROWS if row.name == options.row)
    for name in options.subjects:
        samples = options.samples or SUBJECTS[name].calibration
        bench = Bench(SUBJECTS[name], options.folder, options.texts, samples, 1)
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            bench.convert(row, options.at, out)
            dense, factored = (
                accuracies(model, options.folder / "questions", options.tasks, options.batch)
                for model in (bench.model, out)
            )
        found = [
            {
                "subject": name, "row": row.name, "keep": options.at, "calibration_tokens": samples * 512, "task": task,
                "questions": len(asked[task]), "chance": chance[task],
                "dense": dense[task][0], "dense_error": dense[task][1],
                "factored": factored[task][0], "factored_error": factored[task][1],
            }
            for task in options.tasks
        ]  # fmt: skip
        whole = book.read(options.out)
        whole["tasks"] = [line for line in whole["tasks"] if line["subject"] != name] + found
        book.write(options.out, whole)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.answers")
    add_options(parser)
    parser.add_argument("--row", default="kfac, global, pivoted", help="of the table of losses")
    parser.add_argument("--at", type=float, default=0.8, help="its budget")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", type=int, default=150, help="questions of each task")
    parser.add_argument("--batch", type=int, default=8)
    ask(parser.parse_args())


if __name__ == "__main__":
    main()

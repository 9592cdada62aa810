"""Questions of BIG-bench, asked of the dense and the factored subjects by lm-evaluation-harness.

    pip install "svdconvert[harness]"
    python -m tests.benchmarks.real.answers --texts wikitext2
    python -m tests.benchmarks.real.answers --texts wikitext2 --data data --calibrated-on self --samples 24

The factored model is that of one row and budget of the table of losses, by default the best at 80 %, or of another
calibration text, one of ``texts.py``. Both are asked the same questions (what the dense one answers is kept in the
folder), and it is kept how many each of them answers alone, from which comes the error of what is left of the
dense model's accuracy above chance: far smaller than from the two accuracies by themselves. They compute in bfloat16,
as models are used, and are scored in float32: the harness would add up log-likelihoods in bfloat16, in which choices
tie (findings/harness_ties_in_half.sh).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from . import book
from .losses import LENGTH, Bench, add_options
from .questions import TASKS, questions
from .rows import ROWS
from .subjects import SUBJECTS, model
from .texts import TRIALS, Library, Reader

HERE = Path(__file__).parent / "harness"
SCORED = "float32"


def right_answers(model: Path, options: argparse.Namespace) -> dict[str, list[bool]]:
    """Task -> whether each question is answered right, by the harness in a process of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # The tasks name files of the default folder, relative to where the harness runs.
        asked = folder / ".cache/real/questions"
        shutil.copytree(options.folder / "questions", asked, ignore=shutil.ignore_patterns("*.tar.gz"))
        names = ",".join(f"bigbench_{name}" for name in options.tasks)
        subprocess.run(
            [
                sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu",
                "--batch_size", str(options.batch),
                "--model_args", f"pretrained={model.resolve()},trust_remote_code=True,dtype={options.dtype}"
                f",softmax_dtype={SCORED}",
                "--include_path", str(HERE), "--tasks", names, "--log_samples", "--output_path", str(folder / "it"),
            ],
            cwd=folder,
            env={**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")},
            check=True,
        )  # fmt: skip
        return {name: _right(folder / "it", name) for name in options.tasks}


def _right(folder: Path, task: str) -> list[bool]:
    (path,) = folder.rglob(f"samples_bigbench_{task}_*.jsonl")
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    return [bool(answer["acc"]) for answer in sorted(answers, key=lambda answer: int(answer["doc_id"]))]


def ask(options: argparse.Namespace) -> None:
    """Ask both models of every subject."""
    asked = questions(options.folder / "questions", options.rows)
    chance = {name: sum(1 / len(each["choices"]) for each in lines) / len(lines) for name, lines in asked.items()}
    (row,) = (row for row in ROWS if row.name == options.row)
    for name in options.subjects:
        samples = options.samples or SUBJECTS[name].calibration
        dense = dense_answers(name, options)
        with tempfile.TemporaryDirectory() as temporary:
            out = Path(temporary) / "out"
            if options.calibrated_on:
                reader = Reader(name, options.folder, Library(options.data))
                reader.convert(options.calibrated_on, samples, options.at, out, row)
            else:
                Bench(SUBJECTS[name], options.folder, options.texts, samples, 1).convert(row, options.at, out)
            factored = right_answers(out, options)
        of = {
            "subject": name, "row": row.name, "keep": options.at, "calibration_tokens": samples * LENGTH,
            "text": options.calibrated_on, "dtype": options.dtype, "scored": SCORED,
        }  # fmt: skip
        found = [
            {**of, "task": task, "chance": chance[task], **counts(dense[task], factored[task])}
            for task in options.tasks
        ]
        whole = book.read(options.out)
        whole["tasks"] = [line for line in whole["tasks"] if book.group(line) != book.group(of)] + found
        book.write(options.out, whole)


def dense_answers(name: str, options: argparse.Namespace) -> dict[str, list[bool]]:
    """Those of a subject as it is, asked once for all calibrations."""
    kept = options.folder / f"{name}.work" / f"answers-{options.dtype}-{SCORED}-{options.rows}.json"
    known: dict[str, list[bool]] = json.loads(kept.read_text()) if kept.exists() else {}
    if not known.keys() >= set(options.tasks):
        known |= right_answers(model(SUBJECTS[name], options.folder), options)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known))
    return known


def counts(dense: Sequence[bool], factored: Sequence[bool]) -> dict[str, int]:
    """How many questions both answer right, one alone, and neither."""
    pairs = Counter(zip(dense, factored, strict=True))
    return {
        "both": pairs[True, True], "dense_alone": pairs[True, False],
        "factored_alone": pairs[False, True], "neither": pairs[False, False],
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.answers")
    add_options(parser)
    parser.add_argument("--row", default="kfac, global, pivoted", help="of the table of losses")
    parser.add_argument(
        "--calibrated-on",
        default="",
        choices=sorted({text for trial in TRIALS.values() for text in trial.calibrations}),
        help="a text of texts.py; by default that of the table of losses",
    )
    parser.add_argument("--data", type=Path, help="folder with these texts")
    parser.add_argument("--at", type=float, default=0.8, help="its budget")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", type=int, default=600, help="questions of each task at most")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", help="that both models compute in")
    options = parser.parse_args()
    if options.calibrated_on and options.data is None:
        parser.error("--calibrated-on needs the folder of texts, --data")
    ask(options)


if __name__ == "__main__":
    main()

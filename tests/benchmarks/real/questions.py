"""Multiple-choice questions of BIG-bench as files that lm-evaluation-harness reads without a download.

    python -m tests.benchmarks.real.questions            # into .cache/real/questions

They come with the package bigbench (Apache-2.0, 358 MB, read as it is and not installed). A question is asked without
the list of its choices, as small models need it: each choice is scored as the answer.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .subjects import FOLDER, digest

PACKAGE, SHA256 = "bigbench==1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"

# Name here -> task of the package. Those on which a model of 135 million parameters is clearly above chance.
TASKS: Mapping[str, str] = {
    "goal_inference": "goal_step_wikihow/goal_inference",
    "step_inference": "goal_step_wikihow/step_inference",
    "social_iqa": "social_iqa",
    "cause_and_effect": "cause_and_effect/one_sentence_no_prompt",
    "similarities": "similarities_abstraction",
}


def questions(folder: Path, rows: int, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Write ``NAME.jsonl`` of every task, with ``rows`` questions at most.

    Returns:
        Name -> questions: ``text``, ``choices`` and ``answer``, the place of the right one.

    Raises:
        SystemExit: the package is not the one that was measured.
    """
    found = {}
    for name, task in tasks(folder).items():
        lines = [_question(task, example) for example in task["examples"]]
        random.Random(seed).shuffle(lines)
        found[name] = lines[:rows]
        text = "".join(json.dumps(line) + "\n" for line in found[name])
        (folder / f"{name}.jsonl").write_text(text)
    return found


def tasks(folder: Path) -> dict[str, Any]:
    """Name -> its file in the package, fetched where it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    if not all((folder / f"{name}.task.json").is_file() for name in TASKS):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", str(folder), PACKAGE]
        if not list(folder.glob("bigbench-*.tar.gz")):
            subprocess.run(command, check=True)
        (archive,) = folder.glob("bigbench-*.tar.gz")
        if digest(archive) != SHA256:
            raise SystemExit(f"{archive} is not the file of {PACKAGE} that was measured")
        wanted = {f"bigbench/benchmark_tasks/{task}/task.json": name for name, task in TASKS.items()}
        with tarfile.open(archive) as content:
            for member in content:
                name = wanted.get(member.name.partition("/")[2])
                if name is not None and (read := content.extractfile(member)) is not None:
                    (folder / f"{name}.task.json").write_bytes(read.read())
        archive.unlink()
    return {name: json.loads((folder / f"{name}.task.json").read_text()) for name in TASKS}


def _question(task: Mapping[str, Any], example: Mapping[str, Any]) -> dict[str, Any]:
    choices = list(example["target_scores"])
    before, after = task.get("example_input_prefix", "Q: "), task.get("example_output_prefix", "\nA:")
    return {
        "text": f"{task.get('task_prefix', '')}{before}{example['input'].strip()}{after}",
        "choices": choices,
        "answer": max(range(len(choices)), key=lambda place: example["target_scores"][choices[place]]),
    }


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.questions")
    parser.add_argument("--folder", type=Path, default=FOLDER / "questions")
    parser.add_argument("--rows", type=int, default=150)
    options = parser.parse_args()
    for name, lines in questions(options.folder, options.rows).items():
        print(f"{name}: {len(lines)} questions, {lines[0]}")


if __name__ == "__main__":
    main()

"""The local tasks of examples/lm_eval, and the harness itself on a factored checkpoint where it is installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "lm_eval"
TINY = EXAMPLE.parent / "tiny_polyglot"


def make_data(out: Path, *args: str) -> dict[str, list[dict[str, object]]]:
    """The two data sets."""
    command = [sys.executable, EXAMPLE / "make_data.py", "--out", out, *args]
    subprocess.run(command, check=True, capture_output=True)
    found = {}
    for name in ("cloze", "perplexity"):
        lines = (out / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [json.loads(line) for line in lines]
    return found


def test_the_data_is_of_the_text_and_repeats(tmp_path: Path) -> None:
    data = make_data(tmp_path / "a")
    assert data == make_data(tmp_path / "b")
    reviews = [" ".join(line.split()) for line in (TINY / "heldout.txt").read_text(encoding="utf-8").splitlines()]
    for row in data["cloze"]:
        assert len(set(row["choices"])) == 4
        assert f"{row['start']} {row['choices'][row['answer']]}" in reviews
    assert len(data["cloze"]) == 200
    # No place is the right one more often than chance would have it: 50 expected, standard deviation 6.
    places = [row["answer"] for row in data["cloze"]]
    assert all(30 < places.count(place) < 70 for place in range(4))
    text = "\n".join(row["text"] for row in data["perplexity"])
    assert [" ".join(line.split()) for line in text.splitlines()] == reviews


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_runs_a_factored_checkpoint(tmp_path: Path) -> None:
    from svdconvert import convert

    convert(TINY / "model", tmp_path / "r72", rank=72, device="cpu")
    make_data(tmp_path / "out" / "lm_eval", "--rows", "20")
    arguments = f"pretrained={tmp_path / 'r72'},trust_remote_code=True,dtype=float32"
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args", arguments]
    command += ["--include_path", str(EXAMPLE), "--tasks", "reviews_cloze,reviews_perplexity", "--limit", "5"]
    command += ["--device", "cpu", "--output_path", str(tmp_path / "results.json")]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (path,) = tmp_path.glob("results*.json")
    results = json.loads(path.read_text())["results"]
    assert 0 <= results["reviews_cloze"]["acc,none"] <= 1
    assert 1.2 < results["reviews_perplexity"]["bits_per_byte,none"] < 2.0

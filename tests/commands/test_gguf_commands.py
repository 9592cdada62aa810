"""A GGUF file as MODEL of every command: the same results as from the checkpoint that it was made from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from svdconvert import convert, evaluate
from svdconvert.errors import InputError
from svdconvert.planning.events import Events
from svdconvert.planning.steps import Step

from support.checkpoints import read_config, read_weights, tree  # isort: skip
from support.gguf_files import tiny, write_gguf  # isort: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in GGUF, in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama"))


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as transformers saves it."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("saved") / "tiny"
    tiny("llama").save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join("the" * (5 + 7 * i % 40) + "then" * (i % 9) for i in range(120)))
    return path


CALIBRATED = ("--calib-samples", 4, "--calib-length", 32, "--keep", 0.5, "--device", "cpu")


def test_conversions(model: Path, folder: Path, words: Path, run: Any, tmp_path: Path) -> None:
    """Bit by bit, with and without a text; what comes out is compared with the file again."""
    for name, options in {
        "plain": ("--rank", 16, "--device", "cpu"),
        "kfac": ("--calib", words, *CALIBRATED, "--method", "kfac", "--refit", "sequential"),
    }.items():
        for source in (model, folder):
            done = run(source, *options, "--out", tmp_path / name / source.name)
            assert done.code == 0, done.err
        out, other = tmp_path / name / model.name, tmp_path / name / folder.name
        found, expected = read_weights(out), read_weights(other)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        for part in ("tokenizer.json", "chat_template.jinja"):
            assert (out / part).read_bytes() == (other / part).read_bytes()
        assert read_config(out)["svd_ranks"] == read_config(other)["svd_ranks"]
        assert read_config(out)["torch_dtype"] == "float32"
        record = json.loads((out / "svdconvert.json").read_text())
        assert record["source"] == {"name": "tiny.gguf", "repo": None, "commit": None}
        assert run(out.parent / folder.name, "--rank", 16, "--out", out).code == 2
        checked = run("verify", out, "--against", model)
        assert checked.code == 0, checked.out + checked.err
    changed = bytearray(model.read_bytes())
    changed[-5] ^= 0x40
    (tmp_path / "changed.gguf").write_bytes(changed)
    assert run("verify", tmp_path / "plain" / model.name, "--against", tmp_path / "changed.gguf").code == 1


def test_measurements(model: Path, folder: Path, words: Path, run: Any, tmp_path: Path) -> None:
    options: Mapping[str, Any] = {"window": 32, "device": "cpu"}
    ours, theirs = evaluate(model, words, **options, against=folder), evaluate(folder, words, **options)
    assert ours.perplexity == pytest.approx(theirs.perplexity, rel=1e-6)
    assert ours.divergence is not None
    assert ours.divergence.kl == pytest.approx(0, abs=1e-6)
    assert ours.parameters == theirs.parameters

    def told(*command: object) -> Any:
        done = run(*command, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    for command in (
        ("plan", "--rank", 16),
        ("spectrum", "--device", "cpu"),
        ("ablate", "--text", words, "--window", 32, "--groups", 2, "--device", "cpu"),
    ):
        found, expected = (told(command[0], source, *command[1:]) for source in (model, folder))
        if command[0] == "plan":
            kept = ("params", "groups", "svd_ranks", "training_bytes")
            found, expected = ({key: said[key] for key in kept} for said in (found, expected))
        assert _close(found, expected), command


def _close(one: Any, other: Any) -> bool:
    """Whether two reports agree, names of models and times aside."""
    if isinstance(one, dict):
        passing = {"model", "source", "seconds"}
        return all(_close(one[key], other[key]) for key in one.keys() - passing)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_close, one, other))
    return one == pytest.approx(other, rel=1e-5) if isinstance(one, float) else one == other


def test_sweep_and_statistics(model: Path, words: Path, run: Any, tmp_path: Path) -> None:
    text = ("--calib-samples", 4, "--calib-length", 32, "--device", "cpu")
    done = run("calibrate", model, "--calib", words, *text, "--out", tmp_path / "stats")
    assert done.code == 0, done.err
    done = run(model, "--stats", tmp_path / "stats", "--keep", 0.5, "--device", "cpu", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    swept = ("--text", words, "--rank", 16, "--method", "svd", "--window", 32, "--no-plot", "--device", "cpu")
    done = run("sweep", model, *swept, "--out", tmp_path / "sweep")
    assert done.code == 0, done.err
    assert len(json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]) == 1


class _Stop(Events):
    """Breaks off after a few matrices."""

    def __init__(self) -> None:
        self.left = 5

    def solved(self, step: Step, report: Mapping[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise RuntimeError("stopped")


def test_continued(model: Path, tmp_path: Path) -> None:
    """A conversion that broke off goes on with the same file, and not with another one of its name."""
    path, out = tmp_path / "tiny.gguf", tmp_path / "out"
    path.write_bytes(model.read_bytes())
    options: Mapping[str, Any] = {"rank": 16, "device": "cpu", "max_shard_size": "60KB", "check": False}
    with pytest.raises(RuntimeError, match="stopped"):
        convert(path, out, **options, events=_Stop())
    changed = bytearray(model.read_bytes())
    changed[-5] ^= 0x40
    path.write_bytes(changed)
    with pytest.raises(InputError, match="holds"):
        convert(path, out, **options)
    path.write_bytes(model.read_bytes())
    report = convert(path, out, **options)
    assert report.outcome.resumed > 0
    convert(model, tmp_path / "whole", **options)
    assert tree(out) == tree(tmp_path / "whole")

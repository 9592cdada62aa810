"""The table command: rows done once, killed and continued, and a page that says what was measured."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from support.training_runs import settings_for

from examples.dialogue import table1
from examples.dialogue.encoding import dialogue_data
from examples.dialogue.evaluation import TOTAL
from examples.dialogue.experiment import read_experiment
from examples.dialogue.models import load_trained
from examples.dialogue.page import PAPER, paper_table
from svdconvert.errors import InputError, JobError

ROOT = Path(__file__).parents[2]
ROWS = """
[[rows]]
name = "m"
table = "paper"
settings = "settings.json"

[[rows]]
name = "m-P-S"
table = "paper"
settings = "settings.json"
svd = "O"
set.model.trained_by = "row:m"
set.convert = { rank = 16 }

[[rows]]
name = "m-P-S-8bit"
table = "paper"
of = "m-P-S"
bits = 8

[[rows]]
name = "m-P-S before"
table = "paper"
of = "m-P-S"
start = true

[[rows]]
name = "A"
table = "adapters"
settings = "settings.json"
set.adapter = { kind = "llama-adapter", length = 4, layers = 2 }
"""
HEAD = """
title = "A table"
work = "work"
page = "page"
profile = "mdd-offline"
threads = 1
examples = 2
full_size = false
remarks = ["Nothing is learned here.", "Row A ends at {A.perplexity}, KL of P-S is {m-P-S.kl}."]

[decoding]
max_new_tokens = 4

[tables]
paper = "As in the paper"
adapters = "Adapters"

[references]
paper = "m"
"""


def write(folder: Path, dense: Path, text: str = HEAD + ROWS) -> Path:
    settings_for(folder, dense, speech={"samples": 1}, training={"epochs": 8, "learning_rate": 5e-3})
    path = folder / "table.toml"
    path.write_text(text, encoding="utf-8")
    return path


def in_this_process(words, name, threads):
    """A row's command without a process of its own, which would import everything again."""
    assert threads == 1
    assert words[:2] == [sys.executable, "-m"]
    importlib.import_module(words[2]).main(words[3:], standalone_mode=False)


def losses_of(path: Path, name: str, reference: str) -> list[float]:
    """Loss of the answers under a row's model and KL from another's, in float64 by their definitions."""
    settings = {row.name: row.settings for row in read_experiment(path).rows}
    models = []
    for row in (name, reference):
        model, tokenizer = load_trained(settings[row], torch.device("cpu"))
        models.append(model.double())
    data = settings[name].data
    sums, count = [0.0, 0.0], 0
    for row in dialogue_data(data.validation, tokenizer, data, 0, 1).rows:
        with torch.no_grad():
            own, other = (model(torch.tensor([row["input_ids"]])).logits[0].softmax(-1) for model in models)
        for place, label in enumerate(row["labels"][1:]):
            if label != -100:
                sums[0] -= float(own[place, label].log())
                sums[1] += float((other[place] * (other[place] / own[place]).log()).sum())
                count += 1
    return [total / count for total in sums]


def test_the_table(dense, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sacrebleu")
    path = write(tmp_path, dense)
    table1.main(["--config", str(path), "--rows", "m"], standalone_mode=False)
    assert "-- m\n" in capsys.readouterr().out
    page = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    assert "Not done yet: m-P-S, m-P-S-8bit, m-P-S before, A." in page
    assert "Row A" not in page
    kept = (tmp_path / "work" / "results" / "m.json").stat().st_mtime_ns

    monkeypatch.setattr(table1, "_call", in_this_process)
    table1.main(["--config", str(path)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "-- m\n" not in said
    assert "-- A\n" in said
    assert (tmp_path / "work" / "results" / "m.json").stat().st_mtime_ns == kept
    folder = tmp_path / "page"
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert "Not done yet" not in page
    assert "Nothing is learned here." in page
    assert "full size" not in page
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["m", "m-P-S", "m-P-S-8bit", "m-P-S before", "A"]
    told = {name: row["statistics"] for name, row in rows.items()}
    assert f"Row A ends at {told['A']['perplexity']:,.2f}, KL of P-S is {told['m-P-S']['kl']:.3f}." in page
    for name, row in rows.items():
        assert row["scores"]["pairs"] == 4
        lines = page.splitlines()
        at = next(i for i, line in enumerate(lines) if line.startswith(f"| {name} |"))
        header = next(line for line in reversed(lines[:at]) if line.startswith(("| model |", "| method |")))
        shown = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, lines[at])), strict=True))
        scores = [row["scores"]["scores"][score] for score in TOTAL]
        assert [shown[score] for score in TOTAL] == [f"{score:.2f}" for score in scores]
        assert shown["Total"] == f"{sum(scores):.2f}"
        assert shown["loss"] == f"{told[name]['loss']:.3f}"
        assert shown.get("KL", "-") == ("-" if name in ("m", "A") else f"{told[name]['kl']:.3f}")
        assert len(row["examples"]) == 2
    assert any(sum(row["scores"]["scores"][score] for score in TOTAL) > 20 for row in rows.values())
    expected = losses_of(path, "m-P-S", "m")
    assert [told["m-P-S"]["loss"], told["m-P-S"]["kl"]] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    # before the training: what was factored, which is worse
    assert told["m-P-S before"]["loss"] > told["m-P-S"]["loss"]
    assert told["m-P-S before"]["kl"] > 0
    # the pipeline's second half starts from the first row's result
    assert rows["m-P-S"]["run"]["source_parameters"] > rows["m-P-S"]["run"]["start_parameters"]
    assert rows["m-P-S-8bit"]["statistics"]["weights"] < rows["m-P-S"]["statistics"]["weights"]
    assert rows["A"]["run"]["memory"]["trainable"] == 2 * (4 * 64 + 4)
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert html.count("<tr>") == page.count("\n|") - page.count("\n| --- |")
    for name in ("total.png", "evaluation_loss.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"
        assert f"]({name})" in page
        assert f'src="{name}"' in html
    assert str(tmp_path) not in (folder / "results.json").read_text(encoding="utf-8")


def test_the_time_of_a_row_is_that_of_all_its_calls(dense, tmp_path, monkeypatch):
    experiment = read_experiment(write(tmp_path, dense))
    clock = iter((0.0, 20.0, 100.0, 103.5))
    monkeypatch.setattr(table1.time, "perf_counter", lambda: next(clock))

    def broken(*_):
        raise JobError("broke off")

    monkeypatch.setattr(table1, "_filled", broken)
    with pytest.raises(JobError):
        table1.fill(experiment, experiment.rows[0])
    monkeypatch.setattr(table1, "_filled", lambda *_: {"name": "m"})
    assert table1.fill(experiment, experiment.rows[0])["seconds"] == 23.5
    assert [file.name for file in (tmp_path / "work" / "results").iterdir()] == ["m.json"]


@pytest.mark.parametrize("quoted", ["{B.perplexity}", "{A.cost}"])
def test_a_remark_that_quotes_what_there_is_not(dense, tmp_path, capsys, quoted):
    path = write(tmp_path, dense, (HEAD + ROWS).replace("{A.perplexity}", quoted))
    with pytest.raises(SystemExit, match="2"):
        table1.main(["--config", str(path)], standalone_mode=False)
    assert f"a remark quotes {quoted}; rows are m, m-P-S, m-P-S-8bit, m-P-S before, A, figures F1, loss" in (
        capsys.readouterr().err
    )


def test_the_papers_totals_are_summed_anew():
    header, rows = paper_table()
    totals = {row[0]: row[header.index("Total")] for row in rows}
    assert totals == {
        "3.8B": "56.00",
        "1.3B": "52.89",
        "1.3B-S": "45.18",  # printed 44.43
        "3.8B-S-L": "44.43",  # printed 45.18
        "1.3B-S-L": "39.66",
        "3.8B-S": "24.09",
        "1.3B-P-FS": "29.20",
        "1.3B-P-S": "30.06",
    }
    assert len(PAPER) == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD, "has no [[rows]]"),
        (HEAD + ROWS + ROWS, "two rows named m"),
        (HEAD.replace("title", "titel") + ROWS, "unknown setting titel"),
        (HEAD.replace('work = "work"', "") + ROWS, "lacks the setting work"),
        (HEAD + ROWS.replace('table = "adapters"', 'table = "other"'), "is of table 'other'"),
        (HEAD + ROWS.replace('"row:m"', '"row:n"'), "starts from 'n', which is no row before it"),
        (HEAD + ROWS.replace('of = "m-P-S"', 'of = "x"'), "is of 'x', which is no row before it"),
        (
            HEAD.replace('paper = "m"', 'paper = "A"') + ROWS,
            "KL of row m is measured from 'A', which is no row before it",
        ),
        (HEAD + ROWS.replace("bits = 8", "bit = 8"), "unknown setting bit"),
        (HEAD + ROWS.replace("rank = 16", "ranks = 16"), "unknown setting convert.ranks"),
    ],
)
def test_mistakes_are_named(dense, tmp_path, text, message):
    with pytest.raises(InputError) as error:
        read_experiment(write(tmp_path, dense, text))
    assert message in str(error.value)


def test_an_unknown_row_and_a_row_that_cannot_be_done(dense, tmp_path, capfd):
    path = write(tmp_path, dense)
    with pytest.raises(SystemExit, match="2"):
        table1.main(["--config", str(path), "--rows", "x"])
    assert "there is no row 'x'" in capfd.readouterr().err
    (tmp_path / "train.jsonl").write_text("{}\n")
    with pytest.raises(SystemExit, match="2"):
        table1.main(["--config", str(path), "--rows", "m"])
    said = capfd.readouterr().err
    assert "row m cannot be done, see above" in said
    assert "Traceback" not in said

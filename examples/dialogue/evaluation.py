"""Profiles of metrics, and the evaluation of one file of predictions.

``ko`` is for Korean; ``mdd`` has the definitions of MultiDoc2Dial's shared-task script for English, and ``mdd-offline``
the same without NLTK's data. ``Total`` is the sum of F1, METEOR, ROUGE-L and SacreBLEU, as in Lee et al. (2023).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from examples.dialogue import metrics
from examples.dialogue.schema import nfc
from examples.dialogue.tokenizers import MetricTokenizer, Whitespace, tokenizer_named
from svdconvert.errors import InputError

TOTAL = ("F1", "METEOR", "ROUGE-L", "SacreBLEU")
KOREAN_TOKENIZER = "kiwi"


@dataclass(frozen=True)
class Scores:
    """What came out of an evaluation; all values are 0 to 100, but ``total``, which goes to 400.

    Attributes:
        profile: its name.
        pairs: how many answers were compared.
        scores: by name; the four of :data:`TOTAL` first.
        signatures: of the scores, by the same names.
        rates: of the answers by themselves, see :func:`examples.dialogue.metrics.speech_rates`.
        rates_tokenizer: what the rates were counted with.
    """

    profile: str
    pairs: int
    scores: Mapping[str, float]
    signatures: Mapping[str, str]
    rates: Mapping[str, float] = field(default_factory=dict)
    rates_tokenizer: str = ""

    @property
    def total(self) -> float:
        """Sum of F1, METEOR, ROUGE-L and SacreBLEU."""
        return sum(self.scores[name] for name in TOTAL)

    def to_json(self) -> dict[str, Any]:
        """For a file or a script."""
        return {
            "profile": self.profile,
            "pairs": self.pairs,
            "scores": dict(self.scores),
            "total": self.total,
            "signatures": dict(self.signatures),
            "rates": dict(self.rates),
            "rates_tokenizer": self.rates_tokenizer,
        }


def _korean(tokenizer: MetricTokenizer) -> Mapping[str, metrics.Metric]:
    return {
        "F1": metrics.word_f1,
        "METEOR": metrics.meteor(tokenizer),
        "ROUGE-L": metrics.rouge_l(tokenizer),
        "SacreBLEU": metrics.bleu("ko-mecab"),
        "F1 char": metrics.character_f1,
        "BLEU char": metrics.bleu("char"),
        "chrF++": metrics.chrf,
    }


def _english(*, wordnet: bool) -> Callable[[MetricTokenizer], Mapping[str, metrics.Metric]]:
    def make(tokenizer: MetricTokenizer) -> Mapping[str, metrics.Metric]:
        return {
            "F1": metrics.word_f1,
            "METEOR": metrics.english_meteor(wordnet=wordnet),
            "ROUGE-L": metrics.english_rouge_l,
            "SacreBLEU": metrics.bleu("13a"),
        }

    return make


# Name -> the metrics, given the tokenizer where a profile has a choice; a new profile is a row.
PROFILES: Mapping[str, Callable[[MetricTokenizer], Mapping[str, metrics.Metric]]] = {
    "ko": _korean,
    "mdd": _english(wordnet=True),
    "mdd-offline": _english(wordnet=False),
}


def evaluate(
    predictions: Sequence[str], references: Sequence[str], profile: str = "ko", *, tokenizer: str | None = None
) -> Scores:
    """Compare generated answers with the right ones.

    Args:
        predictions: may be empty texts.
        references: as many, none of them empty.
        profile: a row of :data:`PROFILES`.
        tokenizer: what METEOR, ROUGE-L and the rates of the profile ``ko`` count with; kiwi by default.

    Raises:
        InputError: there is no such profile or tokenizer, a package of it is not installed, the lists differ in
            length, or an entry is no text.
    """
    if profile not in PROFILES:
        raise InputError(f"there is no profile {profile!r}; choose {', '.join(PROFILES)}")
    if tokenizer is not None and profile != "ko":
        raise InputError(f"the profile {profile} has its own tokenizers; leave --tokenizer away")
    if len(predictions) != len(references) or not references:
        raise InputError(
            f"there are {len(predictions):,} predictions for {len(references):,} references; give one for each"
        )
    for name, texts in (("prediction", predictions), ("reference", references)):
        for index, text in enumerate(texts):
            if not isinstance(text, str) or (name == "reference" and not text.strip()):
                what = "is empty" if isinstance(text, str) else f"is {type(text).__name__}, not text"
                raise InputError(f"{name} {index} {what}; give flat lists of texts")
    cutter = tokenizer_named(tokenizer or KOREAN_TOKENIZER) if profile == "ko" else Whitespace()
    hypotheses = [nfc(text).strip() for text in predictions]
    answers = [nfc(text).strip() for text in references]
    found = {name: metric(hypotheses, answers) for name, metric in PROFILES[profile](cutter).items()}
    return Scores(
        profile=profile,
        pairs=len(answers),
        scores={name: score.value for name, score in found.items()},
        signatures={name: score.signature for name, score in found.items()},
        rates=metrics.speech_rates(hypotheses, cutter),
        rates_tokenizer=cutter.name,
    )

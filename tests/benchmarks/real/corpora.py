"""Public texts in two languages, as documents, with a part to calibrate on and another to test on.

A folder holds ``nsmc`` (Korean reviews and synopses of films, CC0; the reviews in the form that
examples/tiny_polyglot/README.md describes), ``manual2dial_ko`` (Korean dialogues about the manuals of telephones, MIT),
``doc2dial`` (English dialogues about the pages of offices, CC BY 3.0; both in MultiDoc2Dial's form), ``wikitext2``
(articles of the English Wikipedia, CC BY-SA 3.0) and ``tinystories`` (English stories, CDLA-Sharing-1.0). The two parts
have no film, article or dialogue in common, and depend on nothing but the files.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHARACTERS = 2000  # of a document at most; longer ones are cut at an end of a line
SEED = 1234  # of examples/tiny_polyglot/train.py: the films held out are those that the bundled model never saw
FILMS = 160  # held out there
_PAGES = 4  # one of so many is held out

Documents = list[str]


@dataclass(frozen=True)
class Parts:
    """Documents of one source.

    Attributes:
        calibration: to calibrate on; empty if it is for tests alone.
        test: to test on.
    """

    calibration: Documents
    test: Documents


@dataclass(frozen=True)
class Corpus:
    """One source.

    Attributes:
        title: for tables.
        read: takes the folder of all of them.
    """

    title: str
    read: Callable[[Path], Parts]


def reviews(data: Path) -> Parts:
    """Reviews of films as the bundled model has read them: cleaned, 24 of a film to a document, a line each."""
    from examples.tiny_polyglot.train import documents, read_reviews

    movies = read_reviews(data / "nsmc" / "nsmc_reviews.tsv.gz")
    held, others = held_out(movies, FILMS)
    return Parts(*(documents(movies, names, random.Random(SEED)) for names in (others, held)))


def synopses(data: Path) -> Parts:
    """What films are about."""
    films = json.loads((data / "nsmc" / "synopses.json").read_text("utf-8"))
    return Parts([], shuffled(film["synopsis"] for film in films))


def korean_dialogues(data: Path) -> Parts:
    """Two files of different dialogues."""
    files = (data / "manual2dial_ko" / f"manual2dial_dial_{part}.json" for part in ("validation", "test"))
    return Parts(*(shuffled(spoken(turns, "사용자", "상담원") for _, turns in dialogues(file)) for file in files))


def english_dialogues(data: Path) -> Parts:
    """Dialogues of one file, parted by the page that they are about."""
    pages: dict[str, Documents] = {}
    for page, turns in dialogues(data / "doc2dial" / "doc2dial_val_dial.rebuilt.json"):
        pages.setdefault(page, []).append(spoken(turns, "User", "Agent"))
    held, others = held_out(pages, len(pages) // _PAGES)
    return Parts(*(shuffled(text for page in names for text in pages[page]) for names in (others, held)))


def articles(data: Path) -> Parts:
    """Pieces of articles: those of one file to calibrate on, those of the other to test on."""
    files = (data / "wikitext2" / f"wiki.{part}.tokens" for part in ("valid", "test"))
    return Parts(*(shuffled(cut(file.read_text("utf-8-sig"))) for file in files))


def stories(data: Path) -> Parts:
    """Stories for children."""
    text = (data / "tinystories" / "tinystories_sample.txt").read_text("utf-8")
    return Parts([], shuffled(story.strip() for story in text.split("<|endoftext|>")[:-1]))  # the last is cut off


# Name in the file of measurements -> where it comes from.
CORPORA: Mapping[str, Corpus] = {
    "reviews": Corpus("Korean reviews", reviews),
    "synopses": Corpus("Korean synopses", synopses),
    "manual2dial": Corpus("Korean dialogue", korean_dialogues),
    "wikitext": Corpus("English articles", articles),
    "tinystories": Corpus("English stories", stories),
    "doc2dial": Corpus("English dialogue", english_dialogues),
}


def held_out(groups: Mapping[str, Any], count: int) -> tuple[list[str], list[str]]:
    """Names of so many groups, chosen at random, and of the others."""
    names = sorted(groups)
    random.Random(SEED).shuffle(names)
    return names[:count], names[count:]


def shuffled(documents: Iterator[str]) -> Documents:
    """Those with something in them, in an order of their own."""
    found = [text for text in documents if text.strip()]
    random.Random(SEED).shuffle(found)
    return found


def cut(text: str) -> Iterator[str]:
    """Pieces of about CHARACTERS characters at most, of whole lines; none goes beyond the end of an article."""
    for article in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text):
        piece = ""
        for line in article.splitlines():
            if piece and len(piece) + len(line) > CHARACTERS:
                yield piece
                piece = ""
            piece += f"{line.strip()}\n" if line.strip() else ""
        yield piece


def dialogues(file: Path) -> Iterator[tuple[str, Sequence[Mapping[str, Any]]]]:
    """Page, or nothing, and turns of each dialogue of a file in MultiDoc2Dial's form."""
    for domain in json.loads(file.read_text("utf-8"))["dial_data"].values():
        for dialogue in domain:
            yield dialogue.get("doc_id", ""), dialogue["turns"]


def spoken(turns: Sequence[Mapping[str, Any]], user: str, other: str) -> str:
    """A dialogue, a line for each turn, with the names of who speaks."""
    return "\n".join(f"{user if turn['role'] == 'user' else other}: {turn['utterance']}" for turn in turns)


def mixed(parts: Sequence[Documents], tokens: Callable[[str], int], count: int) -> Documents:
    """Documents with at least so many tokens together, about as many of each part.

    The next document is always one of the part that has had the fewest tokens so far. What is asked for with a smaller
    count is the beginning of the same list.

    Raises:
        SystemExit: there are not so many.
    """
    left, had, chosen = [iter(part) for part in parts], [0] * len(parts), []
    while sum(had) < count:
        least = had.index(min(had))
        text = next(left[least], None)
        if text is None:
            raise SystemExit(f"a text has {had[least]:,} tokens; {count // len(parts):,} are asked for")
        chosen.append(text)
        had[least] += tokens(text)
    return chosen

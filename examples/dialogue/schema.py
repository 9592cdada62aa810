"""One training or evaluation sample, and the JSONL file that holds many of them.

A line of the file is one object, UTF-8:

    {"id": "d1_3", "dialogue_id": "d1", "domain": "ssa", "doc_id": "...", "title": "...", "passage": "...",
     "spans": [[12, 40]], "section": [0, 95], "dialogue": [{"role": "user", "text": "..."}, ...],
     "question": "...", "answer": "...", "language": "ko"}

``id``, ``passage``, ``question`` and ``answer`` are needed, the rest is optional. All text is NFC once it is read.
"""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError

ROLES = ("user", "agent")
NEEDED = ("id", "passage", "question", "answer")
FIELDS = (*NEEDED, "dialogue_id", "domain", "doc_id", "title", "spans", "section", "dialogue", "language")

Span = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """A question about a passage, what was said before, and the answer.

    Attributes:
        id: unique in its file.
        dialogue_id: samples of one dialogue share it; they never end up on both sides of a split.
        passage: the document, or a part of it; empty where the data has none.
        question: the user's last utterance.
        answer: the agent's reply, never empty.
        history: earlier turns as (role, text), oldest first, without the question; roles are ``user`` and ``agent``.
        spans: what the answer is grounded in, as [start, end) characters of the passage.
        section: [start, end) characters of the section or sections around the spans.
        domain, doc_id, title: of the document.
        language: as in ``ko``, ``en``; empty where it is not known.
    """

    id: str
    dialogue_id: str
    passage: str
    question: str
    answer: str
    history: tuple[tuple[str, str], ...] = ()
    spans: tuple[Span, ...] = ()
    section: Span | None = None
    domain: str = ""
    doc_id: str = ""
    title: str = ""
    language: str = ""

    @property
    def grounding(self) -> Span | None:
        """From the first span's start to the last one's end, as MultiDoc2Dial's own script takes it."""
        return (min(s for s, _ in self.spans), max(e for _, e in self.spans)) if self.spans else None

    def to_json(self) -> dict[str, Any]:
        """The object of one line; optional fields without content are left out."""
        entry: dict[str, Any] = {"id": self.id, "dialogue_id": self.dialogue_id}
        entry |= {name: getattr(self, name) for name in ("domain", "doc_id", "title") if getattr(self, name)}
        entry["passage"] = self.passage
        if self.spans:
            entry["spans"] = [list(span) for span in self.spans]
        if self.section:
            entry["section"] = list(self.section)
        entry["dialogue"] = [{"role": role, "text": text} for role, text in self.history]
        entry |= {"question": self.question, "answer": self.answer}
        if self.language:
            entry["language"] = self.language
        return entry


class FieldError(ValueError):
    """A field of an entry is not what it must be.

    Attributes:
        field: its name.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.field, self.reason = name, reason


@dataclass(frozen=True)
class Problem:
    """Something that was left out, and why.

    Attributes:
        where: line of the file, or the entry's id.
        field: name of the field; empty where the whole line is meant.
        reason: what is wrong with it.
    """

    where: str
    field: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}, field {self.field!r}: {self.reason}" if self.field else f"{self.where}: {self.reason}"


@dataclass
class Report:
    """What became of the entries of a file.

    Attributes:
        source: the file.
        kept: samples that came out.
        dropped: entries that did not, counted by reason.
        problems: malformed ones among the dropped, one by one.
        notes: remarks about entries that were kept, counted.
        lengths: quantiles of the kept samples' lengths in tokens, by part; empty where none were counted.
    """

    source: str
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, dict[str, int]] = field(default_factory=dict)

    def malformed(self, where: str, name: str, reason: str) -> None:
        """Count a malformed entry and keep where it is."""
        self.dropped["malformed"] += 1
        self.problems.append(Problem(where, name, reason))

    def to_json(self) -> dict[str, Any]:
        """For a report file."""
        return {
            "source": self.source,
            "kept": self.kept,
            "dropped": dict(self.dropped),
            "problems": [str(problem) for problem in self.problems],
            "notes": dict(self.notes),
            "lengths": self.lengths,
        }

    def __str__(self) -> str:
        lines = [f"{self.source}: {self.kept:,} kept, {self.dropped.total():,} dropped"]
        lines += [f"  dropped {count:,}: {reason}" for reason, count in self.dropped.most_common()]
        lines += [f"  {problem}" for problem in self.problems]
        lines += [f"  note, {count:,} times: {note}" for note, count in self.notes.most_common()]
        for name, quantiles in self.lengths.items():
            lines.append(
                f"  tokens of the {name}: " + ", ".join(f"{key} {count:,}" for key, count in quantiles.items())
            )
        return "\n".join(lines)


def nfc(text: str) -> str:
    """The text in Unicode's composed form; a Hangul syllable in two encodings would never match otherwise."""
    return unicodedata.normalize("NFC", text)


def parse_sample(entry: Any) -> Sample:
    """A sample out of one decoded line.

    A missing ``dialogue_id`` is what stands before the last underscore of ``id``, if a number follows it, and ``id``
    itself otherwise. Spans count the characters of the passage as it stands in the file.

    Raises:
        FieldError: the first field that is missing or not what it must be.
    """
    if not isinstance(entry, dict):
        raise FieldError("", f"is {_kind(entry)}, not an object")
    text = {name: _text(entry, name) for name in FIELDS if name not in ("spans", "section", "dialogue")}
    for name in ("id", "question", "answer"):
        if not text[name].strip():
            raise FieldError(name, "is empty")
    raw = entry["passage"]
    spans = [_span(value, "spans", raw) for value in _list(entry, "spans")]
    section = entry.get("section")
    head, _, number = text["id"].rpartition("_")
    return Sample(
        id=text["id"],
        dialogue_id=text["dialogue_id"] or (head if head and number.isdigit() else text["id"]),
        passage=text["passage"],
        question=text["question"],
        answer=text["answer"],
        history=tuple(_turn(value) for value in _list(entry, "dialogue")),
        spans=tuple(sorted(spans)),
        section=None if section is None else _span(section, "section", raw),
        domain=text["domain"],
        doc_id=text["doc_id"],
        title=text["title"],
        language=text["language"],
    )


def read_jsonl(path: Path | str) -> tuple[list[Sample], Report]:
    """Read a file of samples; what is malformed is reported, and nothing else is lost.

    Blank lines are skipped. A second sample of the same id is malformed. Unknown fields are noted.

    Raises:
        InputError: the file cannot be read at all, or no line of it is a sample.
    """
    path = Path(path)
    report = Report(str(path))
    samples: dict[str, Sample] = {}
    for number, line in numbered_lines(path):
        where = f"line {number}"
        try:
            entry = json.loads(line.decode("utf-8"))
            sample = parse_sample(entry)
            if sample.id in samples:
                raise FieldError("id", f"{sample.id!r} was there before")
        except UnicodeDecodeError as error:
            report.malformed(where, "", f"is not UTF-8 (byte {error.start} of the line)")
        except FieldError as error:
            report.malformed(where, error.field, error.reason)
        except (ValueError, RecursionError) as error:
            report.malformed(where, "", f"is not valid JSON ({error})")
        else:
            samples[sample.id] = sample
            report.notes.update(f"unknown field {name!r} is ignored" for name in entry if name not in FIELDS)
    report.kept = len(samples)
    if not samples:
        first = f"; {report.problems[0]}" if report.problems else ""
        raise InputError(f"{path} holds no usable sample{first}")
    return list(samples.values()), report


def write_jsonl(path: Path | str, samples: Iterable[Sample]) -> int:
    """Write samples, one a line, and return how many; the file appears under its name once it is whole."""
    return write_lines(path, [sample.to_json() for sample in samples])


def write_lines(path: Path | str, entries: Sequence[Mapping[str, Any]]) -> int:
    """Write objects as JSONL; the file appears under its name once it is whole."""
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    write_whole(path, "".join(lines).encode())
    return len(entries)


def write_whole(path: Path | str, content: bytes) -> None:
    """Write a file that appears under its name once it is whole.

    Raises:
        InputError: the file or its folder cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); give another place") from None


def numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    """Lines of a file that are not blank, with their numbers from 1; a byte order mark is no part of them.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    lines = enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1)
    return [(number, line) for number, line in lines if line.strip()]


def _text(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry:
        if name in NEEDED:
            raise FieldError(name, "is missing")
        return ""
    value = entry[name]
    if not isinstance(value, str):
        raise FieldError(name, f"is {_kind(value)}, not text")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise FieldError(name, "holds half a surrogate pair, which is no text")
    return nfc(value)


def _list(entry: Mapping[str, Any], name: str) -> list[Any]:
    value = entry.get(name, [])
    if not isinstance(value, list):
        raise FieldError(name, f"is {_kind(value)}, not a list")
    return value


def _turn(value: Any) -> tuple[str, str]:
    if not isinstance(value, dict):
        raise FieldError("dialogue", f"has a turn that is {_kind(value)}, not an object")
    role = value.get("role")
    if role not in ROLES:
        raise FieldError("dialogue", f"has a turn with the role {role!r}; it must be user or agent")
    try:
        text = _text(value, "text")
    except FieldError as error:
        raise FieldError("dialogue", f"has a turn whose text {error.reason}") from None
    if not text.strip():
        raise FieldError("dialogue", "has a turn without text")
    return role, text


def _span(value: Any, name: str, passage: str) -> Span:
    """Check a span and move it to the composed form of the passage."""
    if not (isinstance(value, list) and len(value) == 2 and all(type(item) is int for item in value)):
        raise FieldError(name, f"holds {json.dumps(value, ensure_ascii=False)}, not [start, end]")
    start, end = value
    if not 0 <= start < end <= len(passage):
        raise FieldError(name, f"holds [{start}, {end}], outside of the passage's {len(passage):,} characters")
    return len(nfc(passage[:start])), len(nfc(passage[:end]))


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names[type(value)]

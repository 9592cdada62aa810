"""Samples out of Doc2Dial, MultiDoc2Dial and what has their form, with a report of what was left out.

Samples are made as MultiDoc2Dial's own loader makes them (IBM, `doc2dial_pub.py`): every user turn that an agent turn
follows is a question, unless the agent has no solution; its document is the one the user turn refers to first; the
answer is grounded in the spans that the agent turn refers to.

    dialogues  {"dial_data": {domain: [dialogue, ...]}}             MultiDoc2Dial; documents differ turn by turn
               {"dial_data": {domain: {doc_id: [dialogue, ...]}}}   Doc2Dial; one document a dialogue
    dialogue   {"dial_id", "turns": [{"turn_id", "role", "da", "utterance", "references": [...]}]}
    reference  {"id_sp" or "sp_id", "doc_id"}                       Doc2Dial leaves doc_id to the dialogue
    documents  {"doc_data": {domain: {doc_id: {"doc_text", "title", "spans": {id: {"start_sp", "end_sp",
               "start_sec", "end_sec"}}}}}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from examples.dialogue.schema import FieldError, Report, Sample, parse_sample, read_jsonl
from svdconvert.errors import InputError

# Manual2Dial calls its agent a system.
_ROLES = {"user": "user", "agent": "agent", "system": "agent"}

# Names of the published files, (dialogues of training, of validation, documents).
LAYOUTS = (
    ("multidoc2dial_dial_train.json", "multidoc2dial_dial_validation.json", "multidoc2dial_doc.json"),
    ("doc2dial_dial_train.json", "doc2dial_dial_validation.json", "doc2dial_doc.json"),
    ("manual2dial_dial_train.json", "manual2dial_dial_validation.json", "manual2dial_manual.json"),
)

Documents = Mapping[str, Mapping[str, Any]]


def load(path: Path | str, documents: Documents | None = None, language: str = "") -> tuple[list[Sample], Report]:
    """Samples of a file: JSONL in the project's own form (``.jsonl``), or dialogues (``.json``).

    Args:
        path: the file.
        documents: as :func:`load_documents` gives them; without, the samples of dialogues have no passage.
        language: of samples that do not say it themselves.

    Raises:
        InputError: the file cannot be read, has another form, or gives no sample.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    content = _read_json(path)
    dialogues = content.get("dial_data") if isinstance(content, dict) else None
    if not isinstance(dialogues, dict):
        raise InputError(
            f"{path} has no object dial_data, so it holds no dialogues; give a .jsonl of samples otherwise"
        )
    report = Report(str(path))
    samples: dict[str, Sample] = {}
    for where, domain, doc_id, dialogue in _dialogues(dialogues):
        try:
            if not isinstance(dialogue, dict):
                raise FieldError("", "is no object")
            found = list(_samples(dialogue, domain, doc_id, documents, language, report))
        except FieldError as error:
            name = dialogue.get("dial_id") if isinstance(dialogue, dict) else None
            report.malformed(where if name is None else f"{where} ({name})", error.field, error.reason)
            continue
        for sample in found:
            if sample.id in samples:
                report.dropped["the same dialogue and turn were there before"] += 1
            else:
                samples[sample.id] = sample
    report.kept = len(samples)
    if not samples:
        raise InputError(f"{path} gives no sample; {_reasons(report)}")
    return list(samples.values()), report


def load_documents(path: Path | str) -> Documents:
    """Documents by their ids, of all domains.

    Raises:
        InputError: the file cannot be read or has another form.
    """
    path = Path(path)
    content = _read_json(path)
    domains = content.get("doc_data") if isinstance(content, dict) else None
    if not isinstance(domains, dict) or not all(isinstance(group, dict) for group in domains.values()):
        raise InputError(f"{path} has no object doc_data of domains, so it holds no documents")
    documents = {doc_id: document for group in domains.values() for doc_id, document in group.items()}
    for doc_id, document in documents.items():
        if not isinstance(document, dict) or not isinstance(document.get("doc_text"), str):
            raise InputError(f"{path}: the document {doc_id!r} has no doc_text")
        if not isinstance(document.get("spans", {}), dict):
            raise InputError(f"{path}: the spans of the document {doc_id!r} are no object")
    return documents


def published_files(folder: Path) -> tuple[Path, Path | None, Path | None]:
    """The files of a data set's folder: dialogues of training, of validation, and documents.

    Raises:
        InputError: the folder has none of the published names.
    """
    for train, validation, documents in LAYOUTS:
        if (folder / train).is_file():
            rest = [folder / name if (folder / name).is_file() else None for name in (validation, documents)]
            return folder / train, rest[0], rest[1]
    names = ", ".join(layout[0] for layout in LAYOUTS)
    raise InputError(f"{folder} has none of the files {names}; give a file of dialogues instead")


def _dialogues(data: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any]]:
    """(where, domain, doc_id, dialogue) of both keyings; doc_id is empty where the dialogues are not keyed by it."""
    for domain, group in data.items():
        keyed = group if isinstance(group, dict) else {"": group}
        for doc_id, dialogues in keyed.items():
            key = f"dial_data[{domain!r}]" + (f"[{doc_id!r}]" if doc_id else "")
            if not isinstance(dialogues, list):
                yield key, domain, doc_id, dialogues
                continue
            for index, dialogue in enumerate(dialogues):
                yield f"{key}[{index}]", domain, doc_id, dialogue


def _samples(
    dialogue: Mapping[str, Any],
    domain: str,
    doc_id: str,
    documents: Documents | None,
    language: str,
    report: Report,
) -> Iterator[Sample]:
    name = _need(dialogue, "dial_id", str, "")
    default = doc_id or dialogue.get("doc_id") or ""
    turns = _need(dialogue, "turns", list, "")
    for index, turn in enumerate(turns):
        _check_turn(turn, f"turns[{index}]")
    history: list[dict[str, str]] = []
    for index, turn in enumerate(turns):
        role, text = _ROLES[turn["role"]], turn["utterance"].strip()
        following = turns[index + 1] if index + 1 < len(turns) else {}
        if role == "user":
            try:
                _check_question(turn, following)
                place, note = _place(turn, following, default, documents)
            except _Dropped as dropped:
                report.dropped[str(dropped)] += 1
            else:
                entry = {"id": f"{name}_{turn['turn_id']}", "dialogue_id": name, "domain": domain, **place}
                entry |= {"dialogue": list(history), "question": text, "answer": following["utterance"].strip()}
                yield parse_sample({**entry, "language": language})
                if note:
                    report.notes[note] += 1
        if text:
            history.append({"role": role, "text": text})


class _Dropped(Exception):
    """Why a user turn makes no sample."""


def _check_question(turn: Mapping[str, Any], following: Mapping[str, Any]) -> None:
    if not following or _ROLES[following["role"]] != "agent":
        raise _Dropped("a user turn that no agent turn follows")
    if following.get("da") == "respond_no_solution":
        raise _Dropped("the agent has no solution")
    if not turn["utterance"].strip() or not following["utterance"].strip():
        raise _Dropped("question or answer is empty")


def _place(
    turn: Mapping[str, Any], following: Mapping[str, Any], default: str, documents: Documents | None
) -> tuple[dict[str, Any], str]:
    """Document, passage, spans and section of an answer, and a note, maybe empty."""
    references = turn.get("references") or following.get("references") or []
    doc_id = references[0].get("doc_id", default) if references else default
    if documents is None:
        return {"doc_id": doc_id, "passage": ""}, ""
    if not doc_id:
        raise _Dropped("the turn refers to no document")
    if doc_id not in documents:
        raise _Dropped("the document is not among the documents")
    document = documents[doc_id]
    text = document["doc_text"]
    place = {"doc_id": doc_id, "title": document.get("title") or "", "passage": text}
    grounding = [item for item in following.get("references") or [] if item.get("doc_id", default) == doc_id]
    if not grounding:
        return place, "the answer is grounded in no span of its document"
    known = document.get("spans", {})
    spans = [known.get(str(item.get("id_sp", item.get("sp_id")))) for item in grounding]
    if not all(_is_range(span, "start_sp", "end_sp", text) for span in spans):
        raise _Dropped("the answer's spans are not in the document")
    place["spans"] = [[span["start_sp"], span["end_sp"]] for span in spans]
    if all(_is_range(span, "start_sec", "end_sec", text) for span in spans):
        return {**place, "section": _around(spans, "start_sec", "end_sec")}, ""
    place["section"] = _paragraphs(text, *_around(spans, "start_sp", "end_sp"))
    return place, "the document names no sections: the text between blank lines is taken for one"


def _around(spans: list[Any], start: str, end: str) -> list[int]:
    return [min(span[start] for span in spans), max(span[end] for span in spans)]


def _paragraphs(text: str, start: int, end: int) -> list[int]:
    """The part between blank lines that holds [start, end)."""
    breaks = [match.span() for match in re.finditer(r"\n[ \t]*\n\s*", text)]
    return [
        max((stop for begin, stop in breaks if begin <= start and stop <= end - 1), default=0),
        min((begin for begin, _ in breaks if begin >= end), default=len(text)),
    ]


def _is_range(span: Any, start: str, end: str, text: str) -> bool:
    if not isinstance(span, dict) or type(span.get(start)) is not int or type(span.get(end)) is not int:
        return False
    return 0 <= span[start] < span[end] <= len(text)


def _check_turn(turn: Any, where: str) -> None:
    if not isinstance(turn, dict):
        raise FieldError(where, "is no object")
    if turn.get("role") not in _ROLES:
        raise FieldError(f"{where}.role", f"is {turn.get('role')!r}, not user, agent or system")
    _need(turn, "utterance", str, f"{where}.")
    _need(turn, "turn_id", int, f"{where}.")
    references = turn.get("references") or []
    if not isinstance(references, list) or not all(isinstance(item, dict) for item in references):
        raise FieldError(f"{where}.references", "is no list of objects")


def _need(entry: Mapping[str, Any], name: str, kind: type, prefix: str) -> Any:
    if name not in entry:
        raise FieldError(prefix + name, "is missing")
    if not isinstance(entry[name], kind):
        raise FieldError(prefix + name, f"is {type(entry[name]).__name__}, not {kind.__name__}")
    return entry[name]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON in UTF-8 ({error})") from None


def _reasons(report: Report) -> str:
    counted = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.most_common())
    return (f"dropped: {counted}" if counted else "it has no dialogues") + (
        f"; first, {report.problems[0]}" if report.problems else ""
    )

"""From a sample to the prompt of a model and the answer to learn. A new prompt is a row of :data:`TEMPLATES`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from examples.dialogue.schema import Sample
from svdconvert.errors import InputError

PASSAGES = ("span", "section", "document")

# Where Lee et al. (2023) leave out the middle of their prompt, this is what they print.
ELISION = "...(중략)..."

_KODOC2DIAL = (
    "당신은 주어지는 문서를 보고, 이전 대화 기록을 참조하여, 질문에 답변해야 합니다. "
    "질문은 명백한 지식을 물어볼 수도 있고, 뚜렷한 정답이 없는 선호 대상 추천이나 공감을 바라는 질문일 수도 있습니다. "
    "주어지는 문서는 다음 양식을 따릅니다. {elision} 당신은 〈답변 내용〉을 작성해야 합니다. "
    "이제 문서를 보고, 다음 사용자와 에이전트의 대화 기록을 참조하여, 질문에 대한 〈답변 내용〉을 잘 작성하세요. "
    "[문서] {passage} [대화 기록] {dialogue} [질문] {question} [답변]"
)
_KOREAN_ROLES = {"user": "사용자", "agent": "에이전트"}
_ENGLISH_ROLES = {"user": "user", "agent": "agent"}


@dataclass(frozen=True)
class Template:
    """How a prompt is put together.

    Attributes:
        pattern: the prompt, with {passage}, {dialogue}, {question} and maybe {elision}.
        roles: how the speakers of the history are called.
        turn: one turn of the history, with {role} and {text}.
        joint: stands between two turns.
        nothing: stands for a history without turns and for an empty passage.
        marks: put around the grounding inside the passage; None leaves the passage as it is.
    """

    pattern: str
    roles: Mapping[str, str]
    turn: str = "{role}: {text}"
    joint: str = " "
    nothing: str = ""
    marks: tuple[str, str] | None = None


TEMPLATES: Mapping[str, Template] = {
    # Lee et al. (HCLT 2023), section 4.1; "없음" is from their Table 2, how turns are written is not stated.
    "kodoc2dial": Template(_KODOC2DIAL, _KOREAN_ROLES, nothing="없음"),
    # The same slots without the instructions, for models with a short window.
    "kodoc2dial-short": Template(
        "[문서] {passage} [대화 기록] {dialogue} [질문] {question} [답변]", _KOREAN_ROLES, nothing="없음"
    ),
    # The LLaMA-Adapter paper's form: the gold span is marked, so its scores are those of an oracle.
    "multidoc2dial": Template(
        "{passage} <I> {dialogue} </I> <q> {question} </q>", _ENGLISH_ROLES, marks=("<h>", "</h>")
    ),
    "multidoc2dial-unmarked": Template("{passage} <I> {dialogue} </I> <q> {question} </q>", _ENGLISH_ROLES),
    # Lee et al.'s slots in English, as one turn of a model that was trained on chats in ChatML.
    "doc2dial-chat": Template(
        "<|im_start|>user\nRead the document and the dialogue, and answer the question.\n"
        "Document: {passage}\nDialogue: {dialogue}\nQuestion: {question}<|im_end|>\n<|im_start|>assistant\n",
        _ENGLISH_ROLES,
        nothing="none",
    ),
}


@dataclass(frozen=True)
class Rendered:
    """What a model reads and what it should write.

    Attributes:
        prompt: ends where the answer begins.
        answer: begins with the space between the two; ``prompt + answer`` is the training text, to which the
            end-of-text token belongs.
    """

    prompt: str
    answer: str


def template_named(name: str) -> Template:
    """A row of the table.

    Raises:
        InputError: there is none of that name.
    """
    if name not in TEMPLATES:
        raise InputError(f"there is no template {name!r}; choose {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def render(sample: Sample, template: str = "kodoc2dial", *, elision: str = ELISION) -> Rendered:
    """Put a sample into a template.

    Text is used as it is but for white space, of which one character takes the place of several.

    Args:
        sample: its passage is used whole; :func:`cut` takes a part of it.
        template: name of a row of :data:`TEMPLATES`.
        elision: stands where the authors of ``kodoc2dial`` left out their description of the document's format.

    Raises:
        InputError: there is no such template, or it marks the grounding and the sample has none.
    """
    row = template_named(template)
    turns = [row.turn.format(role=row.roles[role], text=_line(text)) for role, text in sample.history]
    prompt = row.pattern.format(
        passage=(_marked(sample, row.marks, template) if row.marks else _line(sample.passage)) or row.nothing,
        dialogue=row.joint.join(turns) or row.nothing,
        question=_line(sample.question),
        elision=elision,
    )
    # A slot without content leaves two spaces.
    return Rendered(re.sub(" {2,}", " ", prompt).strip(" "), " " + sample.answer.strip())


def cut(sample: Sample, passage: str) -> Sample:
    """The sample with a part of its passage; spans move along.

    Args:
        sample: with the document as its passage.
        passage: ``span``, what the answer is grounded in (:attr:`Sample.grounding`); ``section``, the section around
            it; ``document``, all.

    Raises:
        InputError: the part is not one of these three.
        LookupError: the sample does not say where that part is.
    """
    if passage not in PASSAGES:
        raise InputError(f"there is no passage {passage!r}; choose {', '.join(PASSAGES)}")
    if passage == "document":
        return sample
    part = sample.grounding if passage == "span" else sample.section
    if part is None:
        raise LookupError(f"no {'grounding span' if passage == 'span' else 'section'}")
    start, end = part
    inside = [(max(s, start) - start, min(e, end) - start) for s, e in sample.spans if s < end and e > start]
    return replace(sample, passage=sample.passage[start:end], spans=tuple(inside), section=(0, end - start))


def _marked(sample: Sample, marks: tuple[str, str], template: str) -> str:
    if sample.grounding is None:
        raise InputError(f"sample {sample.id} has no grounding span, which the template {template} marks")
    start, end = sample.grounding
    parts = (sample.passage[:start], marks[0], sample.passage[start:end], marks[1], sample.passage[end:])
    return " ".join(part for part in map(_line, parts) if part)


def _line(text: str) -> str:
    return " ".join(text.split())

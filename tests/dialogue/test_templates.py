"""Prompts, character by character, and passages cut to size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.dialogue.schema import Sample, read_jsonl
from examples.dialogue.templates import TEMPLATES, cut, render
from svdconvert.errors import InputError

TABLE2 = Path(__file__).parents[2] / "examples" / "dialogue" / "table2"

# Lee et al. (HCLT 2023), section 4.1, up to and from where the authors write "...(중략)...".
BEFORE = (
    "당신은 주어지는 문서를 보고, 이전 대화 기록을 참조하여, 질문에 답변해야 합니다. 질문은 명백한 지식을 물어볼 수도 "
    "있고, 뚜렷한 정답이 없는 선호 대상 추천이나 공감을 바라는 질문일 수도 있습니다. 주어지는 문서는 다음 양식을 "
    "따릅니다. "
)
AFTER = (
    " 당신은 〈답변 내용〉을 작성해야 합니다. 이제 문서를 보고, 다음 사용자와 에이전트의 대화 기록을 참조하여, 질문에 "
    "대한 〈답변 내용〉을 잘 작성하세요. [문서] {passage} [대화 기록] {dialogue} [질문] {question} [답변]"
)
SAMPLE = Sample(
    id="d_3",
    dialogue_id="d",
    passage="머리말.\n\n첫째 {것}. 둘째 것.\n\n맺음말.",
    question="둘째는?",
    answer=" 둘째 것입니다. ",
    history=(("user", "첫째는?"), ("agent", "첫째 것이요.")),
    spans=((14, 19),),
    section=(6, 19),
)


def test_the_korean_prompt_is_the_papers() -> None:
    slots = {"passage": "첫째", "dialogue": "사용자: 첫째는? 에이전트: 첫째 것이요.", "question": "둘째는?"}
    rendered = render(Sample(**{**vars(SAMPLE), "passage": "첫째", "spans": ()}))
    assert rendered.prompt == BEFORE + "...(중략)..." + AFTER.format(**slots)
    assert rendered.answer == " 둘째 것입니다."
    assert render(SAMPLE, elision="제목, 본문").prompt.startswith(BEFORE + "제목, 본문 당신은")


def test_table_2_of_the_paper() -> None:
    (sample,), _ = read_jsonl(TABLE2 / "sample.jsonl")
    rendered = render(sample)
    assert rendered.prompt.startswith(BEFORE)
    assert rendered.prompt.endswith(" [대화 기록] 없음 [질문] 사람이 직장으로 돌아가면 어떻게 됩니까? [답변]")
    assert f"[문서] {sample.passage} [대화" in rendered.prompt
    answers = json.loads((TABLE2 / "answers.json").read_text(encoding="utf-8"))["answers"]
    assert [row["setting"] for row in answers] == ["3.8B", "1.3B", "1.3B-S", "3.8B-S-L", "1.3B-S-L", "3.8B-S"]
    assert [row["judgement"] for row in answers].count("판단불가") == 2


def test_the_chat_form_ends_where_the_assistant_begins() -> None:
    rendered = render(SAMPLE, "doc2dial-chat")
    assert rendered.prompt.startswith("<|im_start|>user\nRead the document")
    assert "\nDialogue: user: 첫째는? agent: 첫째 것이요.\nQuestion: 둘째는?<|im_end|>\n" in rendered.prompt
    assert rendered.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    empty = render(Sample("d_1", "d", passage="", question="둘째는?", answer="둘째"), "doc2dial-chat")
    assert "\nDocument: none\nDialogue: none\n" in empty.prompt


def test_the_marked_form_has_a_capital_i() -> None:
    rendered = render(SAMPLE, "multidoc2dial")
    assert rendered.prompt == (
        "머리말. 첫째 {것}. <h> 둘째 것. </h> 맺음말. <I> user: 첫째는? agent: 첫째 것이요. </I> <q> 둘째는? </q>"
    )
    assert rendered.prompt + rendered.answer == rendered.prompt + " 둘째 것입니다."
    whole = Sample(**{**vars(SAMPLE), "spans": ((0, len(SAMPLE.passage)),), "history": ()})
    assert (
        render(whole, "multidoc2dial").prompt
        == "<h> 머리말. 첫째 {것}. 둘째 것. 맺음말. </h> <I> </I> <q> 둘째는? </q>"
    )
    assert "<h>" not in render(SAMPLE, "multidoc2dial-unmarked").prompt


def test_nothing_to_mark_and_unknown_templates_are_refused() -> None:
    plain = Sample(**{**vars(SAMPLE), "spans": ()})
    with pytest.raises(InputError, match="d_3 has no grounding span"):
        render(plain, "multidoc2dial")
    with pytest.raises(InputError, match="no template 'kodoc'; choose kodoc2dial"):
        render(plain, "kodoc")


def test_a_sample_without_a_passage_says_so() -> None:
    empty = Sample("a_1", "a", "", "왜?", "그래서요.")
    assert render(empty, "kodoc2dial-short").prompt == "[문서] 없음 [대화 기록] 없음 [질문] 왜? [답변]"


def test_passages_are_cut_with_their_spans() -> None:
    assert SAMPLE.passage[slice(*SAMPLE.grounding)] == "둘째 것."
    section = cut(SAMPLE, "section")
    assert section.passage == "첫째 {것}. 둘째 것."
    assert section.passage[slice(*section.grounding)] == "둘째 것."
    span = cut(SAMPLE, "span")
    assert (span.passage, span.grounding) == ("둘째 것.", (0, 5))
    assert cut(SAMPLE, "document") is SAMPLE
    with pytest.raises(LookupError, match="no section"):
        cut(Sample("a_1", "a", "글", "왜?", "네."), "section")
    with pytest.raises(InputError, match="no passage 'page'"):
        cut(SAMPLE, "page")


@given(st.data(), st.text(min_size=1, max_size=60))
def test_cutting_keeps_the_grounding(data: st.DataObject, passage: str) -> None:
    def part(low: int, high: int) -> tuple[int, int]:
        start = data.draw(st.integers(low, high - 1))
        return start, data.draw(st.integers(start + 1, high))

    section = part(0, len(passage))
    spans = tuple(sorted(part(*section) for _ in range(2)))
    sample = Sample("a_1", "a", passage, "왜?", "네.", spans=spans, section=section)
    for kind in ("section", "span"):
        shorter = cut(sample, kind)
        assert [shorter.passage[s:e] for s, e in shorter.spans] == [passage[s:e] for s, e in spans]
        assert cut(shorter, kind) == shorter


@given(st.text(), st.text(), st.text(min_size=1).filter(str.strip))
def test_text_is_never_taken_for_a_slot(passage: str, question: str, answer: str) -> None:
    sample = Sample("a_1", "a", passage + " {question}", question + " {passage}", answer)
    for name in TEMPLATES:
        if TEMPLATES[name].marks is None:
            rendered = render(sample, name)
            assert rendered.prompt.count("{question}") == 1 + passage.count("{question}") + question.count("{question}")
            assert rendered.answer == " " + answer.strip()

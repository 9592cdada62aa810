"""Small data in the forms of Doc2Dial and MultiDoc2Dial, made for these tests."""

from __future__ import annotations

from typing import Any

TEXT = (
    "전입신고 안내\n\n"
    "전입신고는 이사한 날부터 14일 안에 합니다. 늦으면 과태료를 냅니다.\n\n"
    "온라인 신고\n정부24에서 신고합니다. 공동인증서가 필요합니다."
)
OTHER = "여권 재발급\n\n사진 한 장과 신분증을 가져오세요. 수수료는 5만 원입니다."
_SENTENCES = {
    "이사": {
        "1": "전입신고 안내",
        "2": "전입신고는 이사한 날부터 14일 안에 합니다.",
        "3": "늦으면 과태료를 냅니다.",
        "4": "정부24에서 신고합니다.",
        "5": "공동인증서가 필요합니다.",
    },
    "여권": {"1": "사진 한 장과 신분증을 가져오세요.", "2": "수수료는 5만 원입니다."},
}


def documents(*, sections: bool = True) -> dict[str, Any]:
    """Two documents; with sections, each paragraph is one."""
    found = {}
    for doc_id, text in (("이사", TEXT), ("여권", OTHER)):
        spans = {}
        for name, sentence in _SENTENCES[doc_id].items():
            start = text.index(sentence)
            span = {"id_sp": name, "start_sp": start, "end_sp": start + len(sentence), "text_sp": sentence}
            if sections:
                begin = text.rfind("\n\n", 0, start)
                end = text.find("\n\n", start)
                span |= {"start_sec": 0 if begin < 0 else begin + 2, "end_sec": len(text) if end < 0 else end}
            spans[name] = span
        found[doc_id] = {
            "doc_id": doc_id,
            "title": f"{doc_id} 문서",
            "domain": "민원",
            "doc_text": text,
            "spans": spans,
        }
    return {"doc_data": {"민원": found}}


def turn(
    number: int, role: str, text: str, *spans: str, doc_id: str = "이사", act: str = "respond_solution"
) -> dict[str, Any]:
    """A turn with references in MultiDoc2Dial's form."""
    references = [{"id_sp": span, "doc_id": doc_id, "label": "solution"} for span in spans]
    return {"turn_id": number, "role": role, "da": act, "utterance": text, "references": references}


def turns() -> list[dict[str, Any]]:
    """Three samples (turns 1, 5 and 7); a user turn before a user turn and one without a solution are none."""
    return [
        turn(1, "user", "전입신고는 언제까지 하나요?", "1"),
        turn(2, "agent", "이사하고 14일 안에 하세요.", "2"),
        turn(3, "user", "벌금 얘기도 있던데요.", "3"),
        turn(4, "user", "잠시만요."),
        turn(5, "user", "늦으면 어떻게 되나요?", "3"),
        turn(6, "agent", "과태료를 내고, 온라인으로도 할 수 있어요.", "3", "4"),
        turn(7, "user", "여권은요?", "1", doc_id="여권"),
        turn(8, "agent", "사진과 신분증을 가져오세요.", "1", doc_id="여권"),
        turn(9, "user", "비자는요?", "2", doc_id="여권"),
        turn(10, "agent", "그건 모르겠어요.", act="respond_no_solution"),
    ]


def multidoc2dial(dialogues: int = 1) -> dict[str, Any]:
    """Dialogues by domain; documents differ turn by turn."""
    return {"dial_data": {"민원": [{"dial_id": f"d{n}", "turns": turns()} for n in range(dialogues)]}}


def doc2dial() -> dict[str, Any]:
    """Dialogues by domain and document; references are called sp_id and name no document."""
    own = [item for item in turns() if item["turn_id"] <= 6]
    for item in own:
        item["references"] = [{"sp_id": ref["id_sp"], "label": "solution"} for ref in item["references"]]
    return {"dial_data": {"민원": {"이사": [{"dial_id": "d0", "doc_id": "이사", "domain": "민원", "turns": own}]}}}

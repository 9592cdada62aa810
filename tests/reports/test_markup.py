"""Elements as text: what comes from outside stays text."""

from __future__ import annotations

import html

from hypothesis import given
from hypothesis import strategies as st
from support.html_pages import parse

from svdconvert.reports.figures import decimals, duration, in_column, perplexity, rounded, share
from svdconvert.reports.markup import Markup, element, joined
from svdconvert.sentences import printable


def test_elements() -> None:
    inner = element("b", 1)
    assert element("p", "a < b", [inner, None], class_="x", aria_label='"', hidden=True, id=None) == (
        '<p class="x" aria-label="&quot;" hidden>a &lt; b<b>1</b></p>'
    )
    assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
    assert joined([Markup("<i>"), "<i>"]) == "<i>&lt;i&gt;"


@given(st.text(max_size=60))
def test_any_text_is_text(text: str) -> None:
    page = parse(f"<!DOCTYPE html>\n{element('html', element('p', text, title=text))}\n".encode())
    (paragraph,) = page.children
    assert paragraph.text == paragraph.attributes["title"] == printable(text)
    assert printable(text).isprintable()


def test_what_does_not_print_and_what_is_long() -> None:
    assert printable("a\u202eb\n\udc80") == "a\\u202eb\\n\\udc80"
    assert len(printable("x" * 10**6)) == 2000
    assert html.unescape(joined("호랑이 & tiger")) == "호랑이 & tiger"


def test_figures() -> None:
    assert [decimals(n) for n in (0.0, 0.25, -1.5, 0.00012345, 1e300)] == [
        "0.0000",
        "0.2500",
        "-1.5000",
        "1.23e-04",
        "1.00e+300",
    ]
    assert [in_column([5e-4, 1.1e-3, 1.4e-4])(n) for n in (5e-4, 1.1e-3, 0.0)] == ["0.00050", "0.00110", "0.00000"]
    assert [in_column(n)(0.25) for n in ([0.3, 0.4], [0.0], [1e-20])] == ["0.2500"] * 3
    assert [duration(n) for n in (0.0031, 12.34, 312.2, 3780)] == ["3 ms", "12.3 s", "5 min 12 s", "1 h 3 min"]
    assert [perplexity(n) for n in (0.0, 4.4349, 20.0, 1e9)] == ["1.00", "84.34", "4.85e+08", "beyond 1e+308"]
    assert [rounded(n) for n in (12, 4211712, 70553706496)] == ["12", "4.212 M", "70.55 B"]
    assert (share(1, 4), share(1, 0)) == ("25.0 %", "")

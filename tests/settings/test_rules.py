"""What a request must fulfil: every rule refuses what it is there for, in one sentence, and a plan looks at its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from svdconvert import Calibration, InputError
from svdconvert.settings import rules
from svdconvert.settings.conversion import Conversion

TEXT = Calibration("text.txt")

# Rule -> keywords that break it, and what is said.
BROKEN: dict[str, list[tuple[dict[str, Any], str]]] = {
    "size": [
        ({}, "give exactly one of rank, keep, params, bytes, fit, max_loss and max_kl"),
        ({"rank": 8, "keep": 0.5}, "give exactly one of"),
        ({"rank": {"a": 8}, "params": 100}, "give exactly one of"),
        ({"rank": 8, "rank_multiple": 0}, "rank_multiple=0 is too small; the least is 1"),
        ({"rank": 0}, "rank=0 is too small; the least is 1"),
        ({"rank": {"a": -1}}, "rank={'a': -1} is too small"),
        ({"rank": 9, "rank_multiple": 8}, "rank=9 does not go with rank_multiple=8; give a multiple, 8 or 16"),
        ({"rank": 7, "rank_multiple": 8}, "give a multiple, 8"),
        ({"keep": 0.0}, "keep=0.0 must lie between 0 and 1"),
        ({"bytes": 1.5}, "bytes=1.5 must lie between 0 and 1"),
        ({"bytes": 20}, "bytes=20 must lie between 0 and 1"),
        ({"fit": 500}, "fit=500 is too small for a device"),
        ({"fit": "8GB", "fit_for": "fun"}, "fit_for='fun' is unknown; choose inference or training"),
        ({"keep": 0.5, "fit_context": 9}, "fit_context=9 has no effect without fit"),
        ({"fit": "8GB", "fit_for": "training", "widths": "8"}, "widths=[8] does not go with fit_for='training'"),
        ({"bytes": 0.5, "factor_all": True}, "factor_all=True does not go with bytes"),
        ({"keep": 0.5, "widths": "8,4"}, "widths=[8, 4] leaves a choice, which bytes makes; beside keep=0.5 give one"),
        ({"rank": {"a": 8}, "widths": "16"}, "widths=[16] has no effect beside rank={'a': 8}"),
        ({"max_loss": 0.1, "widths": "8"}, "widths=[8] does not go with max_loss=0.1"),
        ({"keep": 1.0}, "keep=1.0 must lie between 0 and 1"),
        ({"keep": float("nan")}, "keep=nan must lie between 0 and 1"),
        ({"max_kl": 0.1, "max_loss": 0.1}, "give exactly one of"),
        ({"max_loss": 0.0}, "max_loss=0.0 must be above 0"),
        ({"max_kl": float("inf")}, "max_kl=inf must be above 0 and finite"),
    ],
    "method": [
        ({"keep": 0.5, "method": "magic"}, "method='magic' is unknown; choose one of svd"),
        ({"keep": 0.5, "alpha": 0.5}, "alpha has no effect on method='svd'"),
        ({"keep": 0.5, "method": "asvd", "calibration": TEXT, "alpha": 1.5}, "alpha=1.5 must lie between 0 and 1"),
        ({"keep": 0.5, "calibration": TEXT, "shrinkage": -0.1}, "shrinkage=-0.1 must lie between 0 and 1"),
    ],
    "allocation": [
        ({"keep": 0.5, "allocation": "even"}, "allocation='even' is unknown; choose uniform, global or measured"),
        ({"rank": {"a": 8}, "allocation": "measured", "calibration": TEXT}, "allocation='measured' chooses the ranks"),
        ({"rank": {"a": 8}, "allocation": "global"}, "allocation='global' chooses the ranks itself"),
    ],
    "refit": [
        ({"keep": 0.5, "refit": "twice"}, "refit='twice' is unknown; choose none or sequential"),
        (
            {"keep": 0.5, "refit": "sequential", "calibration": TEXT, "share_layers": 2},
            "refit='sequential' does not go with share_layers",
        ),
        (
            {"max_kl": 0.1, "refit": "sequential", "calibration": TEXT},
            "refit='sequential' is judged by the loss and might exceed max_kl=0.1; give max_loss",
        ),
    ],
    "bits": [
        ({"bytes": 0.5, "calibration": TEXT, "share_layers": 2}, "bytes=0.5 does not go with share_layers=2"),
        ({"bytes": 0.5, "calibration": TEXT, "split_fused": True}, "bytes=0.5 does not go with split_fused=True"),
        ({"bytes": 0.5, "calibration": TEXT, "refit": "sequential"}, "does not go with refit='sequential'"),
        ({"bytes": 0.5, "calibration": TEXT, "allocation": "uniform"}, "does not go with allocation='uniform'"),
        ({"bytes": 0.5, "calibration": TEXT, "layout": "pivoted"}, "does not go with layout='pivoted'"),
        ({"bytes": 0.5, "calibration": TEXT, "method": "whiten"}, "method='whiten' does not estimate"),
        ({"keep": 0.5, "widths": "8", "calibration": TEXT, "layout": "pivoted"}, "widths=[8] does not go with layout"),
        ({"rank": 8, "widths": "8", "calibration": TEXT, "refit": "sequential"}, "does not go with refit='sequential'"),
        ({"fit": 8000, "calibration": TEXT, "share_layers": 2}, "fit=8000 does not go with share_layers=2"),
    ],
    "text": [
        ({"bytes": 0.5}, "bytes=0.5 needs a text"),
        ({"fit": 8000}, "fit=8000 needs a text"),
        ({"keep": 0.5, "method": "kfac"}, "method='kfac' needs a text"),
        ({"keep": 0.5, "refit": "sequential"}, "refit='sequential' needs a text"),
        ({"keep": 0.5, "allocation": "measured"}, "allocation='measured' needs a text"),
        ({"max_loss": 0.5}, "max_loss=0.5 needs a text"),
        ({"max_kl": 0.5, "method": "svd"}, "max_kl=0.5 needs a text"),
        ({"keep": 0.5, "method": "svd", "calibration": TEXT}, "calibration has no effect on method='svd'"),
        (
            {"keep": 0.5, "method": "svd", "calibration": TEXT, "heal": True, "heal_calib": "self"},
            "calibration has no effect on method='svd'",
        ),
        ({"keep": 0.5, "method": "svd", "stats": "s"}, "stats has no effect on method='svd'"),
    ],
    "healing": [
        ({"keep": 0.5, "heal": True}, "heal=True needs a text; give one as heal_calib"),
        ({"keep": 0.5, "stats": "s", "heal": True}, "heal=True needs a text itself; statistics of one do not do"),
        ({"keep": 0.5, "heal_calib": "t"}, "heal_calib='t' has no effect without heal=True"),
        ({"keep": 0.5, "calibration": TEXT, "heal_epochs": 2}, "heal_epochs=2 has no effect without heal=True"),
        ({"keep": 0.5, "calibration": TEXT, "heal": True, "heal_epochs": 0.0}, "heal_epochs=0.0 must be above 0"),
    ],
    "parts": [
        (
            {"keep": 0.5, "method": "fwsvd", "stats": "s", "split_fused": True},
            "method='fwsvd' with split_fused needs the text itself",
        )
    ],
    "solver": [
        ({"keep": 0.5, "solver": "quick"}, "solver='quick' is unknown; choose exact or fast"),
        ({"keep": 0.5, "solver": "fast", "calibration": TEXT}, "does not go with method='kfac'; leave one"),
        ({"keep": 0.5, "solver": "fast", "share_layers": 2}, "does not go with share_layers=2; leave one"),
        ({"keep": 0.5, "solver": "fast", "allocation": "global"}, "does not go with allocation='global'; leave one"),
        (
            {"keep": 0.5, "solver": "fast", "method": "svd", "refit": "sequential", "calibration": TEXT},
            "does not go with refit='sequential'; leave one",
        ),
        (
            {"max_kl": 0.5, "solver": "fast", "method": "svd", "calibration": TEXT},
            "does not go with max_kl=0.5; leave one",
        ),
        ({"keep": 0.5, "solver": "fast", "widths": "8"}, "does not go with widths=[8]; leave one"),
        ({"keep": 0.5, "solver": "fast", "work": "w"}, "does not go with work or keep_work; leave one"),
        ({"keep": 0.5, "solver": "fast", "keep_work": True}, "does not go with work or keep_work; leave one"),
    ],
    "work": [({"keep": 0.5, "work": "w", "keep_work": True}, "give either keep_work")],
    "upload": [
        ({"rank": 8, "private": True}, "private=True has no effect without push_to_hub"),
        ({"rank": 8, "hub_revision": "v1"}, "hub_revision='v1' has no effect without push_to_hub"),
    ],
    "dtype": [({"keep": 0.5, "dtype": "int8"}, "dtype='int8' is unknown; choose keep, float16, bfloat16 or float32")],
    "layout": [({"keep": 0.5, "layout": "flat"}, "layout='flat' is unknown; choose balanced or pivoted")],
    "sharing": [
        ({"keep": 0.5, "share_layers": 2, "share_experts": True}, "does not go with share_experts=True; leave one"),
        ({"keep": 0.5, "share_experts": True, "layout": "pivoted"}, "share_experts=True does not go with layout"),
        ({"keep": 0.5, "share_layers": 0}, "share_layers=0 is too small; the least is 1"),
        ({"keep": 0.5, "share_layers": 2, "layout": "pivoted"}, "share_layers=2 does not go with layout='pivoted'"),
    ],
}
NAMES = {rule.__name__: rule for rule in rules.ALL}
CASES = [(name, keywords, words) for name, cases in BROKEN.items() for keywords, words in cases]


def test_every_rule_has_a_case() -> None:
    assert set(BROKEN) == set(NAMES)
    assert len(NAMES) == len(rules.ALL)


@pytest.mark.parametrize(("name", "keywords", "words"), CASES, ids=[f"{case[0]}: {case[2][:40]}" for case in CASES])
def test_rules(name: str, keywords: dict[str, Any], words: str) -> None:
    request = Conversion.of(**keywords)
    with pytest.raises(InputError) as alone:
        NAMES[name](request)
    assert words in str(alone.value)
    assert "\n" not in str(alone.value)
    with pytest.raises(InputError) as together:
        request.check()
    assert str(together.value) == str(alone.value), "no other rule is broken before it"


@pytest.mark.parametrize(("name", "keywords", "words"), CASES, ids=[f"{case[0]}: {case[2][:40]}" for case in CASES])
def test_a_plan_needs_no_text(name: str, keywords: dict[str, Any], words: str) -> None:
    request = Conversion.of(**keywords)
    if name in ("text", "parts", "work", "upload") and request.size.limit is None:
        request.check_planned()
    else:
        with pytest.raises(InputError):
            request.check_planned()


@pytest.mark.parametrize(
    "keywords",
    [
        {"rank": 8},
        {"rank": {"a": 8, "*": 16}, "rank_multiple": 8, "factor_all": True},
        {"params": 1000, "dtype": "bfloat16", "layout": "pivoted"},
        {"keep": 0.5, "solver": "fast"},
        {"keep": 0.5, "share_layers": 3},
        {"keep": 0.5, "share_experts": True},
        {"keep": 0.5, "allocation": "global"},
        {"keep": 0.5, "calibration": TEXT},
        {"bytes": 0.35, "calibration": TEXT, "widths": [8, 16, 4]},
        {"bytes": "90MB", "stats": "s", "shrinkage": 0.1},
        {"fit": "8GB", "fit_context": 100, "stats": "s", "widths": "16"},
        {"params": 1000, "calibration": TEXT, "widths": "8", "allocation": "uniform"},
        {"rank": 8, "stats": "s", "method": "whiten", "widths": [4], "factor_all": True},
        {"fit": "8GB", "fit_for": "training", "share_layers": 2},
        {"keep": 0.5, "calibration": TEXT, "method": "drone", "shrinkage": 0.1, "split_fused": True},
        {"keep": 0.5, "calibration": TEXT, "method": "fwsvd", "split_fused": True},
        {"keep": 0.5, "stats": "s", "method": "asvd", "alpha": 0.0, "keep_work": True},
        {"keep": 0.5, "calibration": TEXT, "method": "svd", "refit": "sequential", "work": "w"},
    ],
)
def test_good_requests(keywords: dict[str, Any]) -> None:
    request = Conversion.of(**keywords)
    request.check()
    request.check_planned()
    request.settled().check()
    request.check_method()


@pytest.mark.parametrize("limit", [{"max_loss": 0.05}, {"max_kl": 0.05}])
def test_a_size_to_be_found_cannot_be_planned(limit: dict[str, float]) -> None:
    request = Conversion.of(**limit, calibration=TEXT)
    request.check()
    request.settled().check()
    Conversion.of(max_loss=0.05, method="svd", calibration=TEXT, refit="sequential").check()
    with pytest.raises(InputError, match=f"a plan cannot know the size that {next(iter(limit))}=0.05 leads to"):
        request.check_planned()


def test_a_look_at_a_method_needs_no_size() -> None:
    Conversion.of(method="whiten", calibration=TEXT).check_method()
    for keywords in ({"method": "whiten"}, {"layout": "flat"}, {"method": "svd", "stats": Path("s")}):
        with pytest.raises(InputError):
            Conversion.of(**keywords).check_method()


def test_a_text_and_statistics() -> None:
    with pytest.raises(InputError, match="give either calibration, a text, or stats"):
        Conversion.of(keep=0.5, calibration=TEXT, stats="s")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"rank": "abc"}, "rank='abc' is not a whole number"),
        ({"rank": 72.5}, "rank=72.5 is not a whole number"),
        ({"rank": True}, "rank=True is not a whole number"),
        ({"rank": {"dense": "8", "*": 4}}, "rank={'dense': '8'} is not a whole number"),
        ({"rank": 8, "share_layers": None}, "share_layers=None is not a whole number"),
        ({"rank": 8, "workers": 0}, "workers=0 is too small; the least is 1"),
        ({"keep": "60%"}, "keep='60%' is not a number"),
        ({"keep": True}, "keep=True is not a number"),
        ({"rank": 8, "calibration": "text.txt"}, "calibration='text.txt' is not a Calibration; make one with"),
    ],
)
def test_values_of_another_kind(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as refused:
        Conversion.of(**keywords)
    assert str(refused.value).startswith(words)


def test_whole_numbers_of_numpy() -> None:
    request = Conversion.of(rank=np.int64(8), rank_multiple=np.int32(4))
    assert (type(request.size.rank), type(request.size.multiple)) == (int, int)
    assert request == Conversion.of(rank=8, rank_multiple=4)

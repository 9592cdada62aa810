"""Ranks: patterns, budgets, break-even."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdconvert.errors import InputError
from svdconvert.layouts.table import LAYOUTS
from svdconvert.planning.ranks import Target, TargetLayer, assign, matches
from svdconvert.settings.size import Size, parse_count, parse_rank_options

SQUARE, TALL, WIDE = (
    Target(f"layers.0.{name}", f"layers.0.{name}.weight", shape)
    for name, shape in (("square", (64, 64)), ("tall", (256, 64)), ("wide", (64, 256)))
)


def ranks(targets: list[Target]) -> list[int | None]:
    return [target.rank for target in targets]


def test_later_patterns_win() -> None:
    request = Size(16, {"square": 8, "layers.0.*": 4, "tall": 12})
    assert ranks(assign([SQUARE, TALL, WIDE], request, 0)) == [4, 12, 4]


def test_a_pattern_must_name_a_whole_group() -> None:
    others = [TargetLayer(f"layers.{i}.square", f"layers.{i}.square.weight", 64) for i in (1, 2)]
    group = replace(SQUARE, shape=(3 * 64, 64), followers=tuple(others))
    assert ranks(assign([group], Size(16, {"square": 8}), 0)) == [8]
    with pytest.raises(InputError, match=r"matches layers\.0\.square but not layers\.2\.square, and"):
        assign([group], Size(16, {"layers.[01].*": 8}), 0)
    with pytest.raises(InputError, match=r"matches layers\.1\.square but not layers\.0\.square, and"):
        assign([group], Size(16, {"layers.1.square": 8}), 0)


def test_without_a_default_the_rest_stays_dense() -> None:
    targets = assign([SQUARE, TALL], Size(None, {"tall": 12}), 0)
    assert ranks(targets) == [None, 12]
    assert "no rank is given" in targets[0].reason


@pytest.mark.parametrize(
    ("rank", "expected"), [(31, [31, 31, 31]), (32, [None, 32, 32]), (51, [None, 51, 51]), (52, [None, None, None])]
)
def test_break_even(rank: int, expected: list[int | None]) -> None:
    """64 x 64 saves below 32, 256 x 64 below 51.2."""
    assert ranks(assign([SQUARE, TALL, WIDE], Size(rank), 0)) == expected
    assert ranks(assign([SQUARE, TALL, WIDE], Size(rank, factor_all=True), 0)) == [rank] * 3


def test_a_pivoted_layer_keeps_a_row_to_compute() -> None:
    """Even where all is to be factored: at rank 64 of 64 rows `up` would have no outputs."""
    pivoted = [replace(target, layout=LAYOUTS["pivoted"]) for target in (SQUARE, TALL, WIDE)]
    targets = assign(pivoted, Size(64, factor_all=True), 0)
    assert ranks(targets) == [None, 64, None]
    assert "above what the pivoted layout can hold" in targets[0].reason
    assert ranks(assign(pivoted, Size(63, factor_all=True), 0)) == [63, 63, 63]


@given(st.floats(0.05, 0.99))
def test_keep_is_never_exceeded(keep: float) -> None:
    targets = assign([SQUARE, TALL, WIDE], Size(keep=keep), 0)
    for target in targets:
        assert target.rank is not None
        assert target.params <= keep * target.dense_params + 1e-6 * target.dense_params
        assert target.params + sum(target.shape) > keep * target.dense_params


@given(st.floats(0.5, 0.99), st.sampled_from([2, 8, 16]), st.sampled_from(["balanced", "pivoted"]))
def test_multiples_round_down(keep: float, multiple: int, layout: str) -> None:
    """The highest multiple that the fraction allows."""
    targets = [replace(target, layout=LAYOUTS[layout]) for target in (SQUARE, TALL, WIDE)]
    exact = assign(targets, Size(keep=keep), 0)
    for target, free in zip(assign(targets, Size(keep=keep, multiple=multiple), 0), exact, strict=True):
        assert target.rank == (free.rank or 0) // multiple * multiple


def test_multiples_of_given_ranks() -> None:
    request = Size(16, {"tall": 24}, multiple=8)
    assert ranks(assign([SQUARE, TALL], request, 0)) == [16, 24]
    with pytest.raises(InputError, match=r"rank=20 does not go with rank_multiple=8; .* 16 or 24$"):
        Size(20, multiple=8).check()
    with pytest.raises(InputError, match=r"rank={'tall': 7} does not go with rank_multiple=8; give a multiple, 8$"):
        Size(16, {"tall": 7}, multiple=8).check()


def test_multiple_beyond_a_matrix() -> None:
    with pytest.raises(InputError, match=r"rank_multiple=32 leaves no rank .* layers.0.square, a 64 x 64"):
        assign([SQUARE, TALL], Size(keep=0.9, multiple=32), 0)
    assert ranks(assign([TALL], Size(keep=0.9, multiple=32), 0)) == [32]
    with pytest.raises(InputError, match=r"a rank of 5 at most, below the multiple 8; keep at least 0.157"):
        assign([TALL], Size(keep=0.1, multiple=8), 0)
    # 8 (256 + 64) / (256 x 64) = 0.15625, and what the message says is enough
    assert ranks(assign([TALL], Size(keep=0.157, multiple=8), 0)) == [8]
    with pytest.raises(
        InputError, match=r"params=2559 cannot be met; give a number from 2,560 \(no matrix below rank 8\)"
    ):
        assign([TALL], Size(params=2559, multiple=8), 0)
    assert ranks(assign([TALL], Size(params=2560, multiple=8), 0)) == [8]


@given(st.integers(1000 + 36_864 // 32, 1000 + 64 * 64 + 2 * 64 * 256 - 1))
def test_params_is_met_from_below(params: int) -> None:
    targets = assign([SQUARE, TALL, WIDE], Size(params=params), 1000)
    total = 1000 + sum(target.params for target in targets)
    assert total <= params
    assert total > params - sum(sum(target.shape) for target in targets)


@pytest.mark.parametrize("params", [100, 1000 + 36_864 // 32 - 1, 1000 + 64 * 64 + 2 * 64 * 256])
def test_impossible_params(params: int) -> None:
    with pytest.raises(InputError, match="cannot be met"):
        assign([SQUARE, TALL, WIDE], Size(params=params), 1000)


@pytest.mark.parametrize(
    ("module", "pattern", "expected"),
    [
        ("layers.3.attention.dense", "attention.dense", True),
        ("layers.3.attention.dense", "dense", True),
        ("layers.3.attention.dense", "layers.3.*", True),
        ("layers.3.attention.dense", "*", True),
        ("layers.13.attention.dense", "layers.3.*", False),
        ("layers.3.mlp.dense_h_to_4h", "dense", False),
        ("layers.3.mlp.dense_h_to_4h", "dense*", True),
        ("layers.3.attention.dense", "tention.dense", False),
    ],
)
def test_patterns(module: str, pattern: str, expected: bool) -> None:
    assert matches(module, pattern) is expected


@pytest.mark.parametrize(
    ("text", "expected"), [("1.4B", 1_400_000_000), ("500M", 500_000_000), ("1_000", 1000), ("12k", 12_000)]
)
def test_counts(text: str, expected: int) -> None:
    assert parse_count(text) == expected


@pytest.mark.parametrize("text", ["", "B", "1.4X", "-5", "nan"])
def test_bad_counts(text: str) -> None:
    with pytest.raises(InputError):
        parse_count(text)


def test_rank_options() -> None:
    assert parse_rank_options(["768", "a.b=3", "layers.0.*=4"]) == (768, {"a.b": 3, "layers.0.*": 4})
    for bad in (["x"], ["=3"], ["a=b"], ["3", "4"], ["3.5"]):
        with pytest.raises(InputError):
            parse_rank_options(bad)

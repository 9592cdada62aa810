"""The quality table: what a later run replaces."""

from __future__ import annotations

from typing import Any

import pytest

from .quality import merged, table


def results(*rows: tuple[str, float, float], dense: float = 10.0) -> dict[str, Any]:
    cells = [{"name": name, "keep": keep, "perplexity": found, "added": found / 100} for name, keep, found in rows]
    return {"model": "model", "dense_perplexity": dense, "calibration": {}, "window": 256, "rows": cells}


def test_rows_of_a_later_run_take_the_place_of_earlier_ones() -> None:
    before = results(("svd, uniform", 0.8, 11), ("svd, uniform", 0.4, 13), ("kfac, global", 0.8, 11.5), ("gone", 0.8, 1))
    after = results(("kfac, global", 0.8, 10.5), ("asvd, uniform", 0.8, 11.2), dense=10.000001)
    found = merged(before, after)
    order = [(row["name"], row["keep"], row["perplexity"]) for row in found["rows"]]
    assert order == [
        ("svd, uniform", 0.8, 11),
        ("svd, uniform", 0.4, 13),
        ("asvd, uniform", 0.8, 11.2),
        ("kfac, global", 0.8, 10.5),
    ]
    assert table(found).splitlines()[2:] == [
        "| | 80% kept | 40% kept |",
        "|---|---|---|",
        "| svd, uniform | 11.00 (+0.110) | 13.00 (+0.130) |",
        "| asvd, uniform | 11.20 (+0.112) | not run |",
        "| kfac, global | 10.50 (+0.105) | not run |",
    ]


def test_results_of_another_model_are_refused() -> None:
    with pytest.raises(ValueError, match="another dense_perplexity"):
        merged(results(), results(dense=10.1))

"""Losses of models that know nothing: exp of them is no float, and nothing breaks."""

from __future__ import annotations

import json
import math

import pytest

from svdconvert.healing.outcome import Healed, Judged
from svdconvert.models.activations import Loss
from svdconvert.nats import perplexity
from svdconvert.reports import figures


def test_perplexity() -> None:
    assert perplexity(0.0) == 1
    assert perplexity(3.0) == pytest.approx(math.e**3, rel=1e-15)
    assert perplexity(709.0) < perplexity(710.0) == math.inf
    assert Loss(7100.0, 10).perplexity == math.inf
    assert figures.perplexity(710.0) == "beyond 1e+308"


def test_a_model_is_healed_that_knows_nothing() -> None:
    healed = Healed(True, Judged(900.0, 800.0), Judged(2.0, 1.0), 3.0, 8, 8, 1, 1, 1e-4, 1, 0.0, "float32")
    assert "perplexity from inf to 54.60 (dense 20.09)" in str(healed)
    told = json.loads(json.dumps(healed.to_json(), allow_nan=False))
    assert told["before"]["perplexity"] is None
    assert told["after"]["perplexity"] == pytest.approx(math.exp(4.0))

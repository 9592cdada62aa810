"""Which sequences a budget is corrected by."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from svdconvert.calibration.text import CalibrationTokens
from svdconvert.factoring.refit_streams import is_held_out
from svdconvert.factoring.samples import CORRECTED, PARTS, READ, correction_sample


@given(st.integers(3, 400), st.sampled_from([16, 60, 256, 512, 2048]), st.integers(0, 7))
def test_a_round_has_equal_parts_of_text_that_is_not_held_out(count: int, length: int, number: int) -> None:
    ids = torch.zeros(count, length, dtype=torch.int64)
    tokens = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), 1, ids.numel())
    sample = correction_sample(tokens, number)
    held_out = is_held_out(count)
    assert not held_out[sample].any()
    assert len(sample.unique()) == len(sample) >= 2
    assert len(sample) <= PARTS or len(sample) % PARTS == 0
    assert len(sample) * min(length, READ) <= CORRECTED
    free = int((~held_out).sum())
    assert len(sample) >= min(PARTS, free)
    if (number + 2) * len(sample) <= free:
        assert not set(sample.tolist()) & set(correction_sample(tokens, number + 1).tolist())

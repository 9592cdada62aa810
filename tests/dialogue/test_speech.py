"""The check whether a model still speaks."""

from __future__ import annotations

import math

import pytest
import torch

from examples.dialogue.models import load_causal
from examples.dialogue.settings import SpeechSettings
from examples.dialogue.speech import answer_perplexity, listen, repeated_fourgrams
from svdconvert.models.tokenizer import load_tokenizer

CPU = torch.device("cpu")
ROWS = [{"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, -100, 8, 9, 2]}] * 2


def test_perplexity_counts_labels_only(dense):
    model = load_causal(dense, CPU).train()
    with torch.no_grad():
        logs = model.eval()(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits[0].double().log_softmax(-1)
    expected = math.exp(-float(logs[2, 8] + logs[3, 9] + logs[4, 2]) / 3)
    model.train()
    assert answer_perplexity(model, ROWS, CPU) == pytest.approx(expected, rel=1e-4)
    assert model.training


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        ([], 0.0),
        ([1, 1, 1, 1], 0.0),
        ([1] * 8, 0.8),  # five 4-grams, one of them new
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 0.2),  # 1234 2341 3412 4123 1234
    ],
)
def test_repetition(tokens, rate):
    assert repeated_fourgrams(tokens) == pytest.approx(rate)


def test_a_broken_model_is_heard(dense):
    """A head with one loud token repeats it for ever; with the end-of-text token loud, every answer is empty."""
    tokenizer = load_tokenizer(dense)
    limits = SpeechSettings(samples=2, show=1, new_tokens=12)
    for loud, repetition, empty, words in ((40, 8 / 9, 0.0, "repetition"), (tokenizer.eos_token_id, 0.0, 1.0, "empty")):
        model = load_causal(dense, CPU)
        model.base_model.final_layer_norm.weight.data.zero_()
        model.base_model.final_layer_norm.bias.data.fill_(1.0)
        model.lm_head.weight.data.zero_()
        model.lm_head.weight.data[loud] = 1.0
        speech = listen(model, tokenizer, ROWS, limits, CPU, reference_perplexity=1.5)
        assert (speech.repetition, speech.empty) == pytest.approx((repetition, empty))
        assert len(speech.answers) == 1
        assert any(words in warning for warning in speech.warnings)
        assert any("times that of the model before factoring" in warning for warning in speech.warnings)


def test_a_sound_model_is_not_warned_of(dense):
    model = load_causal(dense, CPU)
    limits = SpeechSettings(samples=2, repetition=1.0, empty=1.0)
    reference = answer_perplexity(model, ROWS, CPU)
    assert listen(model, load_tokenizer(dense), ROWS, limits, CPU, reference).warnings == ()

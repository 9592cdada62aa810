"""Every family: what healing minimises, and its gradient, against autograd through both whole models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import read_weights
from support.packed import as_floats, mixed, pack_folder
from support.representatives import FEW
from support.running import TOKENS, load
from transformers import AutoModelForCausalLM

from svdconvert import Calibration, heal, verify
from svdconvert.families.row import Architecture
from svdconvert.healing.distance import Hints
from svdconvert.healing.grid_weights import RELATIVE
from svdconvert.healing.objective import Objective
from svdconvert.healing.student import Student
from svdconvert.healing.teacher import Teacher, teacher_head
from svdconvert.models.blocks import ModelBlocks
from svdconvert.planning.events import Events
from svdconvert.storage.source import LocalSource


@FEW
def test_divergence_and_gradient(row: Architecture, dense: Path, checkpoints: Any, tmp_path: Path) -> None:
    """Padded sequences, some of them at a time; heads that are tied, capped or divided; and a block's output."""
    factored = checkpoints.pair(row.model_type, "pivoted").factored
    blocks, exact = ModelBlocks(LocalSource(dense)), torch.float32
    everything = torch.arange(len(TOKENS.ids))
    teacher = Teacher(blocks, TOKENS, everything, tmp_path, {}, batch_size=2, precision=exact, behind=[0])
    teacher.run(Events(), "")
    student = Student(LocalSource(factored), "cpu", exact)
    with teacher_head(blocks, student.head) as head:
        assert head is None, "the head was copied"
        objective = Objective(student, head, TOKENS, 2, exact, Hints(3.0, [0]))
        mean = objective.differentiate(teacher, everything)
        sums = objective.measure(teacher, everything)

    stock, model = AutoModelForCausalLM.from_pretrained(dense).eval(), load(factored)
    inputs = {"input_ids": TOKENS.ids, "attention_mask": TOKENS.mask.long()}
    predicts = TOKENS.mask[:, :-1] & TOKENS.mask[:, 1:]
    with torch.no_grad():
        p = stock(**inputs).logits[:, :-1][predicts].float().log_softmax(-1)
    q = model(**inputs).logits[:, :-1][predicts].float().log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean()
    with torch.no_grad():  # of which the first one is the embedding
        wanted = stock(**inputs, output_hidden_states=True).hidden_states[1][TOKENS.mask].bfloat16().float()
    states = model(**inputs, output_hidden_states=True).hidden_states[1][TOKENS.mask]
    (kl + 3 * ((states - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()).backward()
    kl = kl.detach()
    assert abs(mean - float(kl)) < 1e-5 * float(kl)
    assert abs(sums.kl / sums.tokens - float(kl)) < 1e-5 * float(kl)
    assert sums.tokens == int(predicts.sum())
    text = TOKENS.ids[:, 1:][predicts][:, None]
    assert abs(sums.other / sums.tokens + float(q.detach().gather(1, text).mean())) < 1e-5
    assert abs(sums.reference / sums.tokens + float(p.gather(1, text).mean())) < 1e-5
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert student.factors
    for name, factor in student.factors.items():
        wanted, found = expected[name], factor.grad
        assert wanted is not None
        assert found is not None
        assert float((found - wanted).norm()) < 1e-4 * float(wanted.norm()), name
    trained = {name for name, parameter in student.factors.items() if parameter.requires_grad}
    assert trained == {name for name in expected if name.endswith(("down.weight", "up.weight"))}


@FEW
def test_gradients_of_scales(row: Architecture, checkpoints: Any, tmp_path: Path) -> None:
    """Packed factors and matrices: what goes into the head, and its gradient, as with the same weights in float32."""
    values = pack_folder(checkpoints.pair(row.model_type).factored, tmp_path / "packed", mixed)
    student = Student(LocalSource(tmp_path / "packed"), "cpu", torch.float32)
    model = load(as_floats(tmp_path / "packed", values, tmp_path / "floats"))
    found = student.hidden(TOKENS.ids, TOKENS.mask)
    output = model.base_model(input_ids=TOKENS.ids, attention_mask=TOKENS.mask.long(), use_cache=False)
    expected = output.last_hidden_state.float()
    assert float((found - expected).detach()[TOKENS.mask].norm()) < 1e-5 * float(expected.detach()[TOKENS.mask].norm())
    for hidden in (found, expected):
        hidden[TOKENS.mask].square().sum().backward()
    weights = dict(model.named_parameters())
    scales = {name: factor for name, factor in student.factors.items() if name.endswith("weight_scale")}
    assert scales
    for name, factor in scales.items():
        weight = weights[name.removesuffix("_scale")]
        assert weight.grad is not None
        by_group = (weight.grad * weight.detach()).unflatten(1, (factor.shape[1], -1)).sum(dim=-1)
        assert factor.grad is not None
        assert float((factor.grad / RELATIVE - by_group).norm()) < 1e-4 * float(by_group.norm()), name


@pytest.mark.parametrize("how", ["end-to-end", "blocks"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma2"])
def test_the_whole_command(model_type: str, how: str, checkpoints: Any, tmp_path: Path) -> None:
    """Weights that lie the other way round, projected and tied embeddings: healed, and as the record says."""
    dense, start = checkpoints.dense(model_type), checkpoints.pair(model_type, "pivoted").factored
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"tiger {i} mountain {i * i % 17}" for i in range(40)))
    calibration = Calibration(str(text), samples=16, length=24)
    settings: dict[str, Any] = {"steps": 2, "lr": 1e-3, "batch_size": 4, "precision": "float32", "device": "cpu"}
    heal(start, dense, calibration, tmp_path / "out", **settings, how=how)
    checks = verify(tmp_path / "out", dense)
    assert [check for check in checks if not check.passed] == []
    assert {"data", "factored matrices", "outcome"} <= {check.name for check in checks}
    before, after = read_weights(start), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith(("down.weight", "up.weight"))}

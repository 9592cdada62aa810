"""The three losses against their formulas in float64, and their weights in the Trainer."""

from __future__ import annotations

import pytest
import torch
from support.training_runs import settings_for
from transformers import TrainingArguments

from examples.dialogue.distillation import DistillationTrainer, distillation_terms
from examples.dialogue.models import load_causal
from examples.dialogue.settings import DistillationSettings
from svdconvert.errors import InputError

CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_formulas():
    b, t, v, d, temperature = 2, 5, 7, 6, 3.0
    s, z = random(b, t, v, seed=0), random(b, t, v, seed=1)
    hs, ht = random(b, t, d, seed=2), random(b, t, d, seed=3)
    labels = torch.tensor([[-100, -100, 3, 1, -100], [-100, 2, 6, -100, 0]])
    ce = task = cos = 0.0
    counted = [(i, j) for i in range(b) for j in range(t - 1) if labels[i, j + 1] != -100]
    for i, j in counted:
        p, q = ((x[i, j].double() / temperature).softmax(-1) for x in (z, s))
        ce += float((p * (p.log() - q.log())).sum()) * temperature**2
        task -= float(s[i, j].double().log_softmax(-1)[labels[i, j + 1]])
        a, c = hs[i, j].double(), ht[i, j].double()
        cos += 1 - float(a @ c / (a.norm() * c.norm()))
    found = distillation_terms(s, z, hs, ht, labels, temperature)
    assert int(found.tokens) == len(counted) == 5
    assert [float(x) for x in (found.ce, found.task, found.cos)] == pytest.approx([ce, task, cos], rel=1e-5)


def test_a_student_like_its_teacher():
    s, h = random(1, 4, 7, seed=0), random(1, 4, 6, seed=1)
    labels = torch.tensor([[-100, 1, 2, 3]])
    found = distillation_terms(s, s, h, h, labels, 2.0)
    assert float(found.ce) == pytest.approx(0, abs=1e-6)
    assert float(found.cos) == pytest.approx(0, abs=1e-6)
    assert float(found.task) > 0


def rows():
    ids = torch.randint(3, 150, (4, 10), generator=torch.Generator().manual_seed(0)).tolist()
    # rows with different numbers of counted tokens, so that a mean of means would be another number
    return [
        {"input_ids": row, "labels": [-100] * (2 * n + 1) + row[2 * n + 1 :], "attention_mask": [1] * 10}
        for n, row in enumerate(ids)
    ]


def trainer(student, teacher, folder, micro_batch, distillation, rate=0.0):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=4 // micro_batch,
        learning_rate=rate,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        max_grad_norm=0.0,
    )
    return DistillationTrainer(
        model=student, args=arguments, train_dataset=rows(), teacher=teacher, distillation=distillation
    )


def test_the_trainer_weighs_and_logs_the_terms(dense, factored, tmp_path):
    weights = DistillationSettings(teacher="x", temperature=2.0, alpha_ce=5.0, alpha_task=2.0, alpha_cos=1.0)
    student, teacher = load_causal(factored, CPU).eval(), load_causal(dense, CPU).eval()
    batch = {key: torch.tensor([row[key] for row in rows()]) for key in rows()[0]}
    plain = {"input_ids": batch["input_ids"], "output_hidden_states": True}
    with torch.no_grad():
        s, t = student(**plain), teacher(**plain)
    terms = distillation_terms(s.logits, t.logits, s.hidden_states[-1], t.hidden_states[-1], batch["labels"], 2.0)
    ce, task, cos = (float(x / terms.tokens) for x in (terms.ce, terms.task, terms.cos))
    for micro_batch in (4, 2, 1):
        run = trainer(student, teacher, tmp_path, micro_batch, weights)
        run.train()
        logged = next(entry for entry in run.state.log_history if "loss" in entry)
        assert logged["loss"] == pytest.approx(5 * ce + 2 * task + cos, rel=1e-3)
        assert [logged[f"loss_{name}"] for name in ("ce", "task", "cos")] == pytest.approx([ce, task, cos], rel=1e-3)


def test_the_teacher_stays_as_it_is(dense, factored, tmp_path):
    student, teacher = load_causal(factored, CPU), load_causal(dense, CPU)
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    own = {name: p.clone() for name, p in student.named_parameters()}
    trainer(student, teacher, tmp_path, 2, DistillationSettings(teacher="x"), rate=1e-3).train()
    assert all(torch.equal(p, before[name]) for name, p in teacher.named_parameters())
    assert sum(not torch.equal(p, own[name]) for name, p in student.named_parameters()) > 20


def test_another_vocabulary_is_refused(dense, factored, tmp_path):
    student, teacher = load_causal(factored, CPU), load_causal(dense, CPU)
    teacher.config.vocab_size = 99
    with pytest.raises(InputError, match="the teacher has 99 tokens"):
        trainer(student, teacher, tmp_path, 1, DistillationSettings(teacher="x"))


def test_evaluation_is_the_labels_alone(dense, factored, tmp_path):
    student, teacher = load_causal(factored, CPU), load_causal(dense, CPU)
    run = trainer(student, teacher, tmp_path, 1, DistillationSettings(teacher="x"))
    run.args.per_device_eval_batch_size = 4
    batch = {key: torch.tensor([row[key] for row in rows()]) for key in rows()[0]}
    with torch.no_grad():
        expected = float(student.eval()(**batch).loss)
    assert run.evaluate(rows())["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_settings_hold_distilberts_weights(tmp_path, dense):
    found = settings_for(tmp_path, dense).distillation
    assert (found.temperature, found.alpha_ce, found.alpha_task, found.alpha_cos) == (2.0, 5.0, 2.0, 1.0)

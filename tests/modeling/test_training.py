"""Full fine-tuning of the factors with the stock Trainer."""

import pytest
from support.tiny_factored import MODELING_FILE, distance, load, logits, read_config, stock_model
from transformers import Trainer, TrainingArguments


def examples(ids):
    return [{"input_ids": row, "labels": row} for row in ids]


def gradients(model, ids):
    model.train()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_every_parameter_has_a_gradient(model, ids, tiny):
    grads = gradients(model, ids)
    weights = {name: t for name, t in tiny.tensors.items() if t.is_floating_point()}  # all but the positions
    assert grads.keys() == weights.keys()
    for name, grad in grads.items():
        assert grad is not None, name
        assert grad.abs().max() > 1e-6, name
    # as many numbers are trained as the checkpoint stores: the dense weight is no parameter
    assert sum(grad.numel() for grad in grads.values()) == sum(t.numel() for t in weights.values())


def test_gradients_are_those_of_the_product(model, ids, tiny):
    """dL/dA = B^T dL/dW and dL/dB = dL/dW A^T, with dL/dW from the stock model; pivoted, B is [I; T].

    A shared A gets the sum over its layers.
    """
    grads, dense = gradients(model, ids), gradients(stock_model(tiny.product), ids)
    of_down = {}
    for path in tiny.ranks:
        key, owner = f"gpt_neox.{path}.", f"gpt_neox.{tiny.shared.get(path, path)}."
        down, up, dw = tiny.tensors[owner + "down.weight"], tiny.tensors[key + "up.weight"], dense[key + "weight"]
        bias = "up.bias"
        if tiny.layout == "pivoted":
            order, bias = tiny.tensors[key + "position"].argsort(), "bias"
            rows, dw = dw[order].split([len(down), len(up)])
        of_down[owner] = of_down.get(owner, 0) + up.T @ dw + (rows if tiny.layout == "pivoted" else 0)
        assert distance(grads[key + "up.weight"], dw @ down.T) < 1e-5
        assert distance(grads[key + bias], dense[key + "bias"]) < 1e-5
    for owner, gradient in of_down.items():
        assert distance(grads[owner + "down.weight"], gradient) < 1e-5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny, ids, use_reentrant):
    plain = gradients(load(tiny.path), ids)
    model = load(tiny.path)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    checkpointed = gradients(model, ids)
    assert all(distance(plain[name], checkpointed[name]) < 1e-6 for name in plain)


def test_trainer(tiny, model, ids, expected, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=3,
        learning_rate=3e-3,
        logging_steps=1,
        save_steps=8,
        report_to=[],
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples(ids))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    trained = logits(model.eval(), ids)
    assert distance(trained, expected) > 0.5

    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "checkpoint-8", tmp_path / "final"):
        assert (folder / MODELING_FILE.name).exists()
        assert read_config(folder)["svd_ranks"] == tiny.ranks
        assert read_config(folder)["svd_layout"] == tiny.svd_layout
        assert read_config(folder)["svd_shared"] == tiny.shared
        again, info = load(folder, output_loading_info=True)
        assert not any(info.values())
        assert distance(logits(again, ids), trained) == 0

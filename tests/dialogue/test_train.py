"""Whole runs of the training command on tiny models: every kind of setting trains, resumes and loads again."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import random_tensors, write_checkpoint
from support.training_runs import killed_run, settings_for, silent

from examples.dialogue import models
from examples.dialogue.memory import count_memory
from examples.dialogue.run_files import last_checkpoint
from examples.dialogue.schedule import schedule
from examples.dialogue.settings import read_settings
from examples.dialogue.train import main, train
from examples.dialogue.trainer import training_arguments
from svdconvert import fold
from svdconvert.errors import InputError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
IDS = torch.randint(3, 150, (2, 12), generator=torch.Generator().manual_seed(0))
TARGETS = {"targets": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}
LORA = {"kind": "lora", "rank": 4, **TARGETS}
NF4 = {"bits": 4, "compute": "float32"}
FWSVD = {"rank": 16, "method": "fwsvd", "calibration": "train", "calibration_samples": 4, "calibration_length": 16}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def perplexity_of(model, settings) -> float:
    """On the rows that the run listened to."""
    from examples.dialogue.encoding import dialogue_data
    from examples.dialogue.speech import answer_perplexity
    from svdconvert.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(models.source_folder(settings))
    rows = dialogue_data(settings.data.validation, tokenizer, settings.data, 0, 1).rows
    return answer_perplexity(model, rows[:2], CPU)


def evaluations(report) -> list[float]:
    return [entry["eval_loss"] for entry in report["history"] if "eval_loss" in entry]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


# What the paper's table and the tables beyond it are made of
KINDS = {
    "dense": {},
    "S": {"convert": {"rank": 16}},
    "S pivoted": {"convert": {"rank": 16, "layout": "pivoted"}},
    "L": {"adapter": LORA},
    "S-L": {"convert": {"rank": 16}, "adapter": LORA},
    "kfac": {"convert": {**FWSVD, "method": "kfac", "keep": 0.4, "rank": 0}},
    "Q": {"adapter": LORA, "quantization": NF4, "training": {"optimizer": "paged"}},
    "S-Q": {"convert": {"rank": 64, "targets": ["mlp.*"]}, "adapter": LORA, "quantization": NF4},
    "8 bits": {"convert": {"rank": 16}, "adapter": LORA, "quantization": {"bits": 8}},
    "A": {"adapter": {"kind": "llama-adapter", "length": 4, "layers": 2}, "training": {"learning_rate": 0.1}},
    "S-A": {
        "convert": {"rank": 16},
        "adapter": {"kind": "llama-adapter", "length": 4, "layers": 2},
        "training": {"learning_rate": 0.1},
    },
    "checkpointing": {"convert": {"rank": 16}, "adapter": LORA, "training": {"gradient_checkpointing": True}},
    "bf16": {"model": {"weights": "bfloat16"}, "training": {"autocast": "bf16", "select": "best"}},
}

TEACHER = {"teacher_weights": "float32", "alpha_ce": 5.0, "alpha_task": 0.0, "alpha_cos": 1.0}
# And those that need something beside the start model
FURTHER = {
    "P-S": {"convert": {"rank": 16}},
    "P-FS": {"convert": FWSVD},
    "distillation": {"convert": {"rank": 16}, "distillation": TEACHER},
    "pre-training": {
        "convert": {"rank": 16},
        "data": {"kind": "text", "max_length": 32, "limit": 16, "validation_limit": 4},
    },
}


def settings_of(kind: str, folder: Path, dense: Path, **more):
    """The run of a kind in a folder, with what it needs."""
    options = {**KINDS, **FURTHER}[kind] | more
    if kind.startswith("P-"):
        settings_for(folder / "first", dense)
        options |= {"model": {"path": "", "trained_by": str(folder / "first" / "settings.json")}}
    elif kind == "distillation":
        options |= {"distillation": {"teacher": str(dense), **TEACHER}}
    elif kind == "pre-training":
        folder.mkdir(exist_ok=True)
        text = folder / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog\n\n" * 40)
        options |= {"data": {**options["data"], "train": str(text), "validation": str(text)}}
    return settings_for(folder, dense, **options)


@pytest.fixture(scope="module")
def finished(dense, tmp_path_factory):
    """Settings and report of the run of a kind, which is done once. Read only."""
    done = {}

    def run(kind: str):
        if kind not in done:
            settings = settings_of(kind, tmp_path_factory.mktemp("run"), dense)
            done[kind] = settings, train(settings, silent)
        return done[kind]

    return run


@pytest.fixture(scope="module")
def kill(dense, tmp_path_factory):
    """Starts a run in a process of its own that is killed while it writes its last checkpoint but one."""
    context = multiprocessing.get_context("forkserver")  # imports once what every run needs
    needed = ["transformers.trainer", "peft", "bitsandbytes", "matplotlib.figure", "examples.dialogue.train"]
    context.set_forkserver_preload([*needed, "transformers.models.gpt_neox.modeling_gpt_neox"])

    def run(settings_file: Path, output: Path) -> None:
        process = context.Process(target=killed_run, args=(settings_file, 6, output))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert last_checkpoint(output / "checkpoints").name == "checkpoint-4"
        assert (output / "checkpoints" / "checkpoint-6").is_dir()

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_loads(kind, finished):
    settings, report = finished(kind)
    folder = Path(settings.output)
    assert (report["steps"], report["warmup"], report["evaluation_every"]) == (8, 1, 2)
    losses = evaluations(report)
    assert len(losses) >= 4
    assert losses[-1] < losses[0]
    assert report["memory"]["trainable"] > 0
    for name in ("loss.png", "log.csv", "report.json", "settings.json"):
        assert (folder / name).stat().st_size > 100
    assert not (folder / "checkpoints").exists()
    assert not list(folder.rglob("*.bin"))
    full = settings.adapter.kind == "none"
    assert (folder / "model").is_dir() == full
    assert (folder / "adapter").is_dir() != full

    model, _ = models.load_trained(settings, CPU)
    # the loaded result has the loss that the Trainer measured last
    assert report["speech"][-1]["perplexity"] == pytest.approx(perplexity_of(model, settings), rel=2e-2)
    if not full:
        base = models.load_causal(Path(report["start"]), CPU, settings.model.weights, settings.quantization)
        assert (logits(model) - logits(base)).abs().max() > 1e-3
    assert train(settings, silent) == json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def llama(dense, tmp_path_factory):
    """A tiny random LLaMA with the tokenizer of ``dense``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from svdconvert.models.tokenizer import load_tokenizer

    torch.manual_seed(0)
    sizes = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2)
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer(dense).save_pretrained(folder)
    return folder


def test_adaption_prompt_of_peft_on_llama(llama, tmp_path):
    adapter = {"kind": "adaption-prompt", "length": 4, "layers": 2}
    settings = settings_for(tmp_path, llama, adapter=adapter, training={"learning_rate": 0.1})
    report = train(settings, silent)
    assert report["memory"]["trainable"] == 2 * (4 * 64 + 1)
    assert evaluations(report)[-1] < evaluations(report)[0]
    model, _ = models.load_trained(settings, CPU)
    assert report["speech"][-1]["perplexity"] == pytest.approx(perplexity_of(model, settings), rel=1e-4)
    factored = settings_for(tmp_path / "factored", llama, adapter=adapter, convert={"rank": 16})
    with pytest.raises(InputError, match=r"adaption-prompt cannot go on this model: .*llama_svd"):
        train(factored, silent)


def test_factors_stay_while_lora_trains_and_fold_gives_the_same_logits(tmp_path):
    dense = write_checkpoint(tmp_path / "dense", random_tensors(dtype=torch.float32), config={"torch_dtype": "float32"})
    settings = settings_for(tmp_path, dense, convert={"rank": 16}, adapter=LORA, training={"learning_rate": 1e-2})
    folder = Path(settings.output)
    train(settings, silent)
    before = weights_in(folder / "start")
    model, _ = models.load_trained(settings, CPU)
    kept = {name.replace("base_model.model.", "").replace(".base_layer", ""): p for name, p in model.named_parameters()}
    assert before.keys() <= kept.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in before.items())
    expected = logits(model)

    # as anybody would load it
    from peft import AutoPeftModelForCausalLM

    again = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", trust_remote_code=True)
    assert (logits(again) - expected).abs().max() < 1e-4
    fold(folder / "start", folder / "adapter", tmp_path / "folded", device="cpu", check=False)
    folded = models.load_causal(tmp_path / "folded", CPU)
    assert (logits(folded) - expected).abs().max() < 1e-4


def test_the_paper_pipeline_in_one_call(finished):
    """-P-FS: fine-tune, FWSVD of the fine-tuned model with the training samples, fine-tune again."""
    second, report = finished("P-FS")
    first = read_settings(second.model.trained_by)
    assert report["source"] == f"{first.output}/model"
    start = json.loads((Path(second.output) / "start" / "svdconvert.json").read_text())
    assert start["settings"]["method"] == "fwsvd"
    texts = (Path(second.output) / "calibration.jsonl").read_text().splitlines()
    assert len(texts) == 16
    reference = report["speech"][0]["reference_perplexity"]
    assert reference == pytest.approx(
        json.loads((Path(first.output) / "report.json").read_text())["speech"][-1]["perplexity"], rel=1e-4
    )


def test_distillation(finished):
    _, report = finished("distillation")
    logged = [entry for entry in report["history"] if "loss" in entry]
    terms = [(entry["loss_ce"], entry["loss_task"], entry["loss_cos"]) for entry in logged]
    for entry, (ce, _, cos) in zip(logged, terms, strict=True):
        assert entry["loss"] == pytest.approx(5 * ce + cos, rel=1e-2)
    # every batch is half of one epoch of four kinds of samples, so batches are alike
    assert terms[-1][0] < 0.8 * terms[0][0]
    assert terms[-1][2] < 0.9 * terms[0][2]


def test_continued_pretraining(finished):
    _, report = finished("pre-training")
    speech = report["speech"]
    assert speech[-1]["perplexity"] < 0.7 * speech[0]["perplexity"]


def test_a_start_that_no_longer_speaks_is_said(dense, tmp_path):
    said: list[str] = []
    limits = {"perplexity_ratio": 0.01, "repetition": -1.0, "empty": -1.0}
    settings = settings_for(tmp_path, dense, convert={"rank": 2}, speech=limits)
    train(settings, said.append)
    start = next(i for i, line in enumerate(said) if line.startswith("start: perplexity"))
    assert "before factoring" in said[start]
    warnings = [line for line in said[start : start + 5] if line.startswith("WARNING: run may no longer speak")]
    assert [("times that of" in w, "repetition" in w, "empty" in w) for w in warnings] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    parameters = next(i for i, line in enumerate(said) if line.startswith("parameters "))
    assert "trainable" in said[parameters]
    assert "peak so far" in said[parameters]
    first_step = next(i for i, line in enumerate(said) if line.startswith("step "))
    assert start < parameters < first_step


def test_other_settings_in_the_same_folder_are_refused_by_name(dense, tmp_path):
    train(settings_for(tmp_path, dense), silent)
    with pytest.raises(InputError, match=r"holds a run with training.learning_rate = 0.001, not 0.01"):
        train(settings_for(tmp_path, dense, training={"learning_rate": 1e-2}), silent)


def test_a_dense_model_reads_what_it_saves(dense, tmp_path):
    """Its head too, which transformers saves under another name than it holds it by."""
    model, again = models.load_causal(dense, CPU), models.load_causal(dense, CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3
    model.save_pretrained(tmp_path)
    found = again.load_state_dict(weights_in(tmp_path), strict=False)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(logits(again), logits(model))


def test_a_checkpoint_cut_short_is_not_taken(tmp_path):
    for name, whole in (("checkpoint-2", True), ("checkpoint-10", True), ("checkpoint-12", False)):
        (tmp_path / name).mkdir()
        if whole:
            (tmp_path / name / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_settings_that_do_not_fit_the_model(dense, tmp_path):
    prompt = {"kind": "adaption-prompt", "length": 4, "layers": 2}
    with pytest.raises(InputError, match=r"adaption-prompt cannot go on this model: .*gpt_neox"):
        train(settings_for(tmp_path / "a", dense, adapter=prompt), silent)
    with pytest.raises(InputError, match="lora cannot go on this model"):
        train(settings_for(tmp_path / "b", dense, adapter={"kind": "lora", "targets": ["q_proj"]}), silent)
    with pytest.raises(InputError, match="'fp16' needs a GPU"):
        train(settings_for(tmp_path / "c", dense, training={"autocast": "fp16"}, adapter=LORA), silent)
    adapter = tmp_path / "d" / "settings.json"
    settings_for(tmp_path / "d", dense, adapter=LORA)
    with pytest.raises(InputError, match="trains an adapter, not a model"):
        train(settings_for(tmp_path / "e", dense, model={"path": "", "trained_by": str(adapter)}), silent)


def test_four_bit_gradients_survive_an_evaluation(dense, tmp_path):
    """At a rank that is no multiple of 64, and on CPUs whose kernel has no gradient: see _quantized_for_training."""
    settings = settings_for(tmp_path, dense, convert={"rank": 24}, adapter=LORA, quantization=NF4)
    start = models.factor(settings, "cpu", Path)
    found = []
    for evaluated in (False, True):
        torch.manual_seed(0)
        model = models.adapt(models.load_causal(start.folder, CPU, "float32", settings.quantization), settings, "")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
            if "lora_A" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if evaluated:
            logits(model)
        model.train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad.any() for grad in found[0].values())
    assert all((found[0][name] - found[1][name]).abs().max() < 1e-6 for name in found[0])


def test_memory_is_counted(factored):
    from peft import LoraConfig, get_peft_model

    model = models.load_causal(factored, CPU)
    total = sum(p.numel() for p in model.parameters())
    counted = count_memory(model)
    assert (counted.parameters, counted.trainable) == (total, total)
    assert counted.gradients == 4 * total
    assert counted.optimizer == 8 * total
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS["targets"]))
    trainable, everything = adapted.get_nb_trainable_parameters()
    with_lora = count_memory(adapted, "paged_adamw_8bit")
    assert (with_lora.parameters, with_lora.trainable) == (everything, trainable)
    assert with_lora.optimizer == 2 * trainable


def command(settings_file: Path) -> list[str]:
    return [sys.executable, "-m", "examples.dialogue.train", "--config", str(settings_file)]


# What each of them saves and loads in its own way: weights, factors of calibrated weights, paged states, layers of a
# class of their own, the best checkpoint of all, a first run before it, a teacher, and text. The others mix these.
CONTINUED = ("S", "kfac", "Q", "A", "bf16", "P-FS", "distillation", "pre-training")


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in CONTINUED else pytest.mark.slow) for kind in [*KINDS, *FURTHER]]
)
def test_killed_and_continued(kind, finished, kill, dense, tmp_path):
    """Killed while it writes a checkpoint and started again, a run ends where an undisturbed one does, bit for bit."""
    whole, expected = finished(kind)
    settings = settings_of(kind, tmp_path, dense, speech={"samples": 0})
    folders = [Path(settings.output)]
    if settings.model.trained_by:
        folders.insert(0, Path(read_settings(settings.model.trained_by).output))
    for folder in folders:
        kill(tmp_path / "settings.json", folder)
    report = train(settings, silent)
    assert [json.loads((folder / "report.json").read_text())["resumed_at"] for folder in folders] == [4] * len(folders)
    assert report["steps"] == expected["steps"] == 8
    name = "model" if settings.adapter.kind == "none" else "adapter"
    before, after = (weights_in(Path(run.output) / name) for run in (whole, settings))
    assert before
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert evaluations(report) == evaluations(expected)


def test_another_seed_is_another_run(dense, finished, tmp_path):
    report = train(settings_of("S", tmp_path, dense, training={"seed": 2}), silent)
    assert evaluations(report) != evaluations(finished("S")[1])


def test_the_command_line(dense, kill, tmp_path, capsys):
    """The real command goes on after a kill; bad input in one sentence."""
    file = tmp_path / "settings.json"
    settings = settings_for(tmp_path, dense, convert={"rank": 16}, speech={"samples": 0})
    kill(file, Path(settings.output))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    again = subprocess.run(command(file), env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "continuing from checkpoint-4" in again.stdout
    assert "run: finished" in again.stdout
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(file), "--set", "training.seed=x"])
    assert "training.seed must be a whole number, not 'x'" in capsys.readouterr().err


def test_a_paged_optimiser_where_there_is_a_gpu(dense, tmp_path):
    settings = settings_for(tmp_path, dense, training={"optimizer": "paged"})
    planned = schedule(16, settings.training)
    names = {"cuda": "paged_adamw_32bit", "cpu": "adamw_torch"}
    for device, name in names.items():
        assert training_arguments(settings, planned, tmp_path, torch.device(device)).optim == name


def test_fsdp_of_cpu_processes_is_refused(dense, tmp_path, monkeypatch):
    """accelerate would train them as DDP without a word."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match=r"no FSDP for CPU processes .* take ddp\.yaml"):
        train(settings_for(tmp_path, dense), silent)

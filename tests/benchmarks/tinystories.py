"""A small LLaMA that has learned something, for the quality table: grouped-query attention, trained on TinyStories.

    python -m tests.benchmarks.tinystories --text tinystories_sample.txt --out FOLDER
    python -m tests.benchmarks.quality --model FOLDER/model --calib FOLDER/calibration.txt --text FOLDER/heldout.txt \\
        --out docs/quality_llama

The text is TinyStories (Eldan & Li, 2023, arXiv:2305.07759), stories separated by <|endoftext|>; 2 MB of it will do.
Needs stock transformers alone, and about thirteen minutes of one core. Writes ``model/``, a float32 checkpoint with its
tokenizer; ``heldout.txt``, stories that were in no training step; ``calibration.txt``, stories that were; and
``log.json``, losses in nats per token. Text, order and initial weights depend on ``--seed`` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

END = "<|endoftext|>"
VOCABULARY, WINDOW, ROWS = 1024, 256, 16
HELDOUT_SHARE, VALIDATION_SHARE, CALIBRATION_CHARACTERS = 0.06, 0.03, 300_000
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def main() -> None:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="TinyStories, stories separated by <|endoftext|>")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=1234)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    training, validation, heldout = split(read_stories(options.text), options.seed)
    (options.out / "heldout.txt").write_text(END.join(heldout) + "\n", "utf-8")
    (options.out / "calibration.txt").write_text(calibration_text(training), "utf-8")
    tokenizer = train_tokenizer(training)
    trainer = train(tokenizer, training, validation, options)
    trainer.model.config.use_cache = True  # the trainer has turned it off
    trainer.model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")

    tokens = windows(tokenizer, heldout)
    result = {
        "parameters": trainer.model.num_parameters(),
        "stories": {"training": len(training), "validation": len(validation), "heldout": len(heldout)},
        "training_tokens": sum(len(window) for window in windows(tokenizer, training)),
        "heldout_loss": trainer.evaluate(examples(tokens), metric_key_prefix="heldout")["heldout_loss"],
        "seconds": round(next(row["train_runtime"] for row in trainer.state.log_history if "train_runtime" in row)),
        "steps": [row for row in trainer.state.log_history if "eval_loss" in row or "loss" in row],
    }
    (options.out / "log.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['parameters']:,} parameters, held-out perplexity {math.exp(result['heldout_loss']):.2f}")


def read_stories(path: Path) -> list[str]:
    """Distinct stories, one paragraph a line; the last one is cut off by the sample's end, and left out."""
    stories = []
    for story in path.read_text("utf-8", errors="ignore").split(END)[:-1]:
        lines = [" ".join(line.split()) for line in story.splitlines()]
        stories.append("\n".join(line for line in lines if line))
    return [story for story in dict.fromkeys(stories) if len(story) > 100]


def split(stories: list[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Training, validation and held-out stories."""
    random.Random(seed).shuffle(stories)
    heldout, validation = (round(share * len(stories)) for share in (HELDOUT_SHARE, VALIDATION_SHARE))
    return stories[heldout + validation :], stories[heldout : heldout + validation], stories[:heldout]


def calibration_text(stories: list[str]) -> str:
    """Stories between blank lines, which separate documents in calibration texts."""
    chosen: list[str] = []
    while sum(map(len, chosen)) < CALIBRATION_CHARACTERS and len(chosen) < len(stories):
        chosen.append(stories[len(chosen)])
    return "\n\n".join(chosen) + "\n"


def train_tokenizer(stories: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def windows(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> list[torch.Tensor]:
    """The stories as one sequence, each with its end, cut into windows: [WINDOW] int64."""
    ids = torch.tensor(tokenizer(END + END.join(stories), verbose=False)["input_ids"])
    return [window for window in ids.split(WINDOW) if len(window) == WINDOW]


def examples(tokens: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Windows as the trainer wants them."""
    return [{"input_ids": window, "labels": window} for window in tokens]


def train(
    tokenizer: PreTrainedTokenizerFast, training: list[str], validation: list[str], options: argparse.Namespace
) -> Trainer:
    """The trained model in its trainer: of all epochs, the one with the lowest validation loss."""
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.2,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=True,
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    torch.manual_seed(options.seed)
    trainer = Trainer(
        model=LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")),
        args=arguments,
        train_dataset=examples(windows(tokenizer, training)),
        eval_dataset=examples(windows(tokenizer, validation)),
    )
    trainer.train()
    return trainer


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""Train the tiny Korean GPT-NeoX in ``model/``: polyglot-ko's architecture, tokenizer and file layout.

The text is the Naver movie review corpus (NSMC, CC0). One command does it all, and resumes where it stopped:

    python examples/tiny_polyglot/train.py --data NSMC_FOLDER --work out/training

It cleans and splits the reviews, trains the tokenizer and then the model, and writes next to this script
``model/``, ``heldout.txt``, ``calibration.txt`` and ``training_log.csv``. Checkpoints and token files stay in
``--work``. The text files and the tokenizer are made once, when ``--work`` has no token files.
The data, their order and the initial weights depend on ``--seed`` alone.
"""

from __future__ import annotations

import csv
import gzip
import html
import json
import math
import os
import random
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

HERE = Path(__file__).resolve().parent

# Data
REVIEWS_PER_DOCUMENT = 24  # a document is this many reviews of one movie, one per line
VALIDATION_MOVIES = 100
HELDOUT_MOVIES, HELDOUT_REVIEWS_PER_MOVIE = 160, 12
CALIBRATION_BYTES = 300_000

# Tokenizer: the ids and the names of polyglot-ko
BPE_SIZE = 4000
FIRST_TOKENS = ["<pad>", "<eos>", "<|endoftext|>", "<|sep|>"]
LAST_TOKENS = ["<|acc|>", "<|tel|>", "<|rrn|>"]
END_OF_TEXT = 2

# Model: the fields of polyglot-ko's config.json
CONFIG = {
    "_name_or_path": "./tiny-polyglot/",
    "architectures": ["GPTNeoXForCausalLM"],
    "bos_token_id": 0,
    "classifier_dropout": 0.1,
    "eos_token_id": END_OF_TEXT,
    "hidden_act": "gelu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 768,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 512,
    "model_type": "gpt_neox",
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "rotary_emb_base": 10000,
    "rotary_pct": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "use_parallel_residual": True,
    "vocab_size": 4016,  # 4,003 used, rounded up to a multiple of 16; polyglot-ko: 30,003 of 30,080
}
# polyglot-ko's file says 0 here, unlike its config.json; kept, so that tools meet the same file.
GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "transformers_version": "4.29.2",
}
MAX_SHARD_BYTES = 3_000_000

# Training
TOKENS_PER_STEP = 4096
# Windows are short at first, because that is faster, and full-length while the learning rate falls, so that
# the model knows every position. Nothing before the fall depends on --steps: it may be changed until then.
SHORT_WINDOW, LONG_WINDOW = 128, 512
WARMUP_STEPS = 100
COOLDOWN = 0.25  # share of the steps
WEIGHT_DECAY = 0.1
LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 50, 250, 250
VALIDATION_BATCHES = 8
LOG_FIELDS = ["step", "tokens", "lr", "train_loss", "valid_loss", "valid_perplexity", "tokens_per_s"]


def read_reviews(path: Path) -> dict[str, list[str]]:
    """Distinct cleaned reviews by movie: NFC, runs of one character cut to three, mostly Hangul."""
    movies: dict[str, list[str]] = {}
    seen = set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        next(lines)  # header
        for line in lines:
            movie, _rating, text = line.rstrip("\n").split("\t")
            text = unicodedata.normalize("NFC", html.unescape(text))
            text = " ".join(re.sub(r"(.)\1{3,}", r"\1\1\1", text).split())
            hangul = sum("가" <= c <= "힣" for c in text)
            if len(text) < 10 or 2 * hangul < len(text) or text in seen:
                continue
            seen.add(text)
            movies.setdefault(movie, []).append(text)
    return movies


def documents(movies: dict[str, list[str]], names: list[str], rng: random.Random) -> list[str]:
    """Each movie's reviews in shuffled order, joined by lines into documents; the documents shuffled too."""
    result = []
    for name in names:
        reviews = rng.sample(movies[name], len(movies[name]))
        for i in range(0, len(reviews), REVIEWS_PER_DOCUMENT):
            result.append("\n".join(reviews[i : i + REVIEWS_PER_DOCUMENT]))
    rng.shuffle(result)
    return result


def train_tokenizer(texts: list[str], directory: Path) -> Tokenizer:
    """Byte-level BPE, written as polyglot-ko's tokenizer.json is (merges as strings, no newer fields)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\u0cf1", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=BPE_SIZE,
            special_tokens=[AddedToken(t, normalized=False) for t in FIRST_TOKENS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    trained = json.loads(tokenizer.to_str())["model"]
    added = list(enumerate(FIRST_TOKENS)) + list(enumerate(LAST_TOKENS, BPE_SIZE))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **flags} for i, token in added],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"String": "\u0cf1"}, "behavior": "Removed", "invert": False},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": {**byte_level, "trim_offsets": False},
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "vocab": dict(sorted(trained["vocab"].items(), key=lambda item: item[1])),
            "merges": [m if isinstance(m, str) else " ".join(m) for m in trained["merges"]],
        },
    }
    end = FIRST_TOKENS[END_OF_TEXT]
    tokenizer_config = {
        "name_or_path": "tiny-polyglot",
        "eos_token": end,
        "pad_token": end,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    extra = FIRST_TOKENS[END_OF_TEXT:] + LAST_TOKENS
    special = {"additional_special_tokens": extra, "eos_token": end, "pad_token": end}
    (directory / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False, indent=2), "utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    (directory / "special_tokens_map.json").write_text(json.dumps(special) + "\n")
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def prepare(data: Path, work: Path, output: Path, seed: int) -> None:
    """Write the token files to WORK and the tokenizer and the two text files to OUTPUT."""
    rng = random.Random(seed)
    movies = read_reviews(data / "nsmc_reviews.tsv.gz")
    names = sorted(movies)
    rng.shuffle(names)
    heldout, names = names[:HELDOUT_MOVIES], names[HELDOUT_MOVIES:]
    validation, train = names[:VALIDATION_MOVIES], names[VALIDATION_MOVIES:]

    lines = [line for name in heldout for line in movies[name][:HELDOUT_REVIEWS_PER_MOVIE]]
    (output / "heldout.txt").write_text("\n".join(lines) + "\n", "utf-8")

    texts = {"train": documents(movies, train, rng), "validation": documents(movies, validation, rng)}
    calibration, size = [], 0
    for text in texts["train"]:
        if size >= CALIBRATION_BYTES:
            break
        calibration.append(text)
        size += len(text.encode()) + 1
    (output / "calibration.txt").write_text("\n".join(calibration) + "\n", "utf-8")

    tokenizer = train_tokenizer(texts["train"], output / "model")
    for split, documents_ in texts.items():
        parts = [np.array([*tokenizer.encode(d).ids, END_OF_TEXT], np.uint16) for d in documents_]
        tokens = np.concatenate(parts)
        np.save(work / f"{split}.npy", tokens)
        characters = sum(map(len, documents_))
        click.echo(f"{split}: {len(parts):,} documents, {characters:,} characters, {len(tokens):,} tokens")


def windows(tokens: np.ndarray, length: int, rows: int, seed: int, start: int) -> Iterator[torch.Tensor]:
    """Endless batches of ROWS windows from batch START on; each epoch is a new permutation of the text."""
    count = (len(tokens) - 1) // length
    per_epoch = count // rows
    index = start
    while True:
        epoch, first = divmod(index, per_epoch)
        order = np.random.default_rng([seed, length, epoch]).permutation(count)
        for i in range(first, per_epoch):
            offsets = order[i * rows : (i + 1) * rows] * length
            # One token more than the window: the last position has a target too.
            batch = np.stack([tokens[o : o + length + 1] for o in offsets]).astype(np.int64)
            yield torch.from_numpy(batch)
            index += 1


def loss_of(model: GPTNeoXForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss, in bf16: both x86 and GPU cores multiply it several times faster than fp32."""
    with torch.autocast(batch.device.type, torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, constant, then half a cosine down to zero over the last COOLDOWN of the steps."""
    fall = int(steps * (1 - COOLDOWN))
    if step < fall:
        return peak * min(1.0, (step + 1) / WARMUP_STEPS)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - fall) / (steps - fall)))


@torch.no_grad()
def validate(model: GPTNeoXForCausalLM, tokens: np.ndarray, device: str) -> float:
    """Mean loss over the same few batches of short windows each time."""
    model.eval()
    batches = windows(tokens, SHORT_WINDOW, TOKENS_PER_STEP // SHORT_WINDOW, seed=0, start=0)
    total = sum(loss_of(model, next(batches).to(device)).item() for _ in range(VALIDATION_BATCHES))
    model.train()
    return total / VALIDATION_BATCHES


def train(work: Path, log: Path, model: GPTNeoXForCausalLM, steps: int, peak: float, seed: int) -> None:
    """Train MODEL in place up to STEPS, from the checkpoint in WORK if there is one."""
    device = model.device.type
    train_tokens, validation_tokens = (np.load(work / f"{split}.npy") for split in ("train", "validation"))
    # Biases and norms are not decayed.
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
        fused=True,
    )
    start, rows = 0, []
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, rows = state["step"], state["log"]
        click.echo(f"resuming after step {start}")

    fall = int(steps * (1 - COOLDOWN))
    batches = None
    model.train()
    losses: list[torch.Tensor] = []
    clock = time.perf_counter()
    for step in range(start, steps):
        if batches is None or step == fall:
            length, first = (SHORT_WINDOW, step) if step < fall else (LONG_WINDOW, step - fall)
            batches = windows(train_tokens, length, TOKENS_PER_STEP // length, seed, first)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(model, next(batches).to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

        done = step + 1
        if done % LOG_EVERY == 0 or done == steps:
            seconds = time.perf_counter() - clock
            row = {
                "step": done,
                "tokens": done * TOKENS_PER_STEP,
                "lr": f"{learning_rate(step, steps, peak):.3g}",
                "train_loss": f"{torch.stack(losses).mean().item():.4f}",
                "valid_loss": "",
                "valid_perplexity": "",
                "tokens_per_s": round(len(losses) * TOKENS_PER_STEP / seconds),
            }
            if done % VALIDATE_EVERY == 0 or done == steps:
                value = validate(model, validation_tokens, device)
                row["valid_loss"], row["valid_perplexity"] = f"{value:.4f}", f"{math.exp(value):.2f}"
            rows.append(row)
            click.echo("  ".join(f"{k} {v}" for k, v in row.items() if v != ""))
            losses = []
            clock = time.perf_counter()
        if done % SAVE_EVERY == 0 or done == steps:
            partial = checkpoint.with_suffix(".partial")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": done, "log": rows}, partial)
            partial.replace(checkpoint)

    with log.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LOG_FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def export(model: GPTNeoXForCausalLM, directory: Path) -> None:
    """Write fp16 shards under the Hub's tensor names, filled in order: a layer may lie in two shards."""
    # Newer transformers calls the head lm_head in memory; the name on disk is embed_out.
    tensors = {
        name.replace("lm_head.", "embed_out."): tensor.detach().cpu().half().contiguous()
        for name, tensor in model.state_dict().items()
    }
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > MAX_SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def heldout_score(directory: Path, text: str, window: int, stride: int) -> str:
    """Perplexity and bits per character of TEXT under the exported model, as ``svdconvert evaluate`` counts them."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = GPTNeoXForCausalLM.from_pretrained(directory).float().eval()
    ids = torch.tensor([END_OF_TEXT, *tokenizer.encode(text).ids])
    targets = len(ids) - 1
    nats, done = 0.0, 0
    while done < targets:
        # Each window scores the tokens which the one before has not; the last one is moved back to be full.
        begin = max(0, min(done - window + stride, targets - window))
        end = min(begin + window, targets)
        logits = model(input_ids=ids[None, begin:end], use_cache=False).logits[0]
        nats += F.cross_entropy(logits[done - end :], ids[done + 1 : end + 1], reduction="sum").item()
        done = end
    return (
        f"{text.count(chr(10)):,} held-out lines, window {window}, stride {stride}: perplexity "
        f"{math.exp(nats / targets):.2f}, {nats / math.log(2) / len(text):.3f} bits per character "
        f"({targets:,} tokens, {len(text):,} characters)"
    )


def keep_freed_memory() -> None:
    """Start again with an allocator that keeps what it frees.

    By default glibc maps every large tensor anew, and where page faults are dear, as in virtual machines,
    training then takes up to ten times as long. The variables are read once, when the process starts.
    """
    settings = {
        "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
        "MALLOC_TOP_PAD_": str(1 << 28),
    }
    if sys.platform == "linux" and not settings.keys() & os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default=HERE.parents[2] / "shared" / "data" / "nsmc",
    show_default="shared/data/nsmc beside the repository",
    help="Folder of nsmc_reviews.tsv.gz.",
)
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Token files and checkpoints.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE, show_default="this folder")
@click.option("--steps", default=3000, help=f"Steps of {TOKENS_PER_STEP} tokens.")
@click.option("--lr", default=2e-3, help="Peak learning rate.")
@click.option("--seed", default=1234)
@click.option("--threads", default=0, help="CPU threads; 0: PyTorch's choice.")
@click.option("--device", default="cpu")
@click.option("--export-only", is_flag=True, help="Export the latest checkpoint without training further.")
def main(
    data: Path,
    work: Path,
    output: Path,
    steps: int,
    lr: float,
    seed: int,
    threads: int,
    device: str,
    export_only: bool,
) -> None:
    """Train the tiny Korean GPT-NeoX of this folder and write it in polyglot-ko's form."""
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    directory = output / "model"
    work.mkdir(parents=True, exist_ok=True)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2, sort_keys=True) + "\n")
    (directory / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2) + "\n")

    if not (work / "validation.npy").exists():
        prepare(data, work, output, seed)
    # Plain attention: at this size the fused CPU kernel is the slower one.
    config = GPTNeoXConfig.from_pretrained(directory, attn_implementation="eager")
    model = GPTNeoXForCausalLM(config).float().to(device)
    if export_only:
        state = torch.load(work / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
    else:
        train(work, output / "training_log.csv", model, steps, lr, seed)
    export(model, directory)
    text = (output / "heldout.txt").read_text("utf-8")
    click.echo(heldout_score(directory, text, window=LONG_WINDOW, stride=LONG_WINDOW // 2))


if __name__ == "__main__":
    keep_freed_memory()
    main()

"""Mixtures of experts: what a truncation costs, and what a conversion takes (docs/experts.md).

    python -m tests.benchmarks.experts train --text tinystories_sample.txt --out FOLDER
    python -m tests.benchmarks.experts quality --folder FOLDER
    python -m tests.benchmarks.experts memory --out FOLDER --layers 1
    python -m tests.benchmarks.experts memory --out FOLDER --geometry gpt_oss --count 16 --experts 1
    python -m tests.benchmarks.experts memory --out FOLDER --experts 128 --method kfac
    python -m tests.benchmarks.experts groups --out FOLDER
    python -m tests.benchmarks.experts solver
    python -m tests.benchmarks.experts speed

``train`` makes a tiny mixture that has learned something: 8 experts of which a token passes 2, on TinyStories. Text,
order and initial weights depend on ``--seed`` alone. ``quality`` converts it by every method and measures held-out
stories. ``memory`` converts some experts of random weights in the geometry of Qwen3-30B-A3B or of gpt-oss-20b, the
latter in MXFP4, and copies the others; with ``--method`` it is given a text of random words. ``groups`` times
statistics that are collected at once and in groups, ``solver`` one of them against ``torch.linalg.svd``, and ``speed``
the experts of the modeling file against those of transformers.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MixtralConfig, MixtralForCausalLM

from tests.benchmarks.tinystories import END, VOCABULARY, calibration_text, read_stories, split, train_tokenizer
from tests.support.packed_experts import packed_experts

LENGTH, ROWS = 128, 16
TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "mxfp4"},
}
GEOMETRIES = {config["model_type"]: config for config in (QWEN, GPT_OSS)}


def train(options: argparse.Namespace) -> None:
    """Train the tiny mixture and write it, with the texts beside it."""
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    training, _, heldout = split(read_stories(options.text), options.seed)
    (out / "heldout.txt").write_text("\n\n".join(heldout) + "\n", "utf-8")
    (out / "calibration.txt").write_text(calibration_text(training), "utf-8")
    tokenizer = train_tokenizer(training)
    ids = torch.tensor(tokenizer(END + END.join(training), verbose=False)["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    torch.manual_seed(options.seed)
    model = MixtralForCausalLM(MixtralConfig(**TINY))
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min(1, (step + 1) / 40) * (1 + math.cos(math.pi * step / options.steps)) / 2
    )
    order = torch.randint(len(rows), (options.steps, ROWS), generator=torch.Generator().manual_seed(options.seed))
    for step, chosen in enumerate(order):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows[chosen], labels=rows[chosen]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(step, f"{float(loss.detach()):.3f}", flush=True)
    model.config.output_router_logits = False
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")


def quality(options: argparse.Namespace) -> None:
    """Convert by every method, with and without factors that experts share, and measure held-out stories."""
    from svdconvert import Calibration, convert, evaluate

    folder: Path = options.folder
    text = Calibration(str(folder / "calibration.txt"), samples=options.samples, length=LENGTH)
    measured = {"window": LENGTH, "device": "cpu"}
    dense = evaluate(folder / "model", folder / "heldout.txt", **measured)
    print(f"dense: perplexity {dense.perplexity:.2f} of {dense.tokens:,} held-out tokens", flush=True)
    for keep in options.keep:
        for method, shared in product(("svd", "whiten", "kfac"), (False, True)):
            how = {"share_experts": shared} if method == "svd" else {"share_experts": shared, "calibration": text}
            out = folder / f"{method}-{keep}"
            convert(folder / "model", out, keep=keep, method=method, device="cpu", overwrite=True, **how)
            found = evaluate(out, folder / "heldout.txt", against=folder / "model", **measured)
            added = math.log(found.perplexity / dense.perplexity)
            kl = math.nan if found.divergence is None else found.divergence.kl
            name = f"{method}, shared by the experts" if shared else method
            print(f"{keep} {name}: {added:+.4f} nats per token, KL {kl:.4f}", flush=True)


def memory(options: argparse.Namespace) -> None:
    """Convert random weights of a geometry in processes of their own, with the check and without."""
    from svdconvert.commands.plan import plan_conversion
    from svdconvert.families.table import ARCHITECTURES
    from svdconvert.settings.conversion import Conversion

    source, config = options.out / options.geometry, GEOMETRIES[options.geometry]
    experts = ARCHITECTURES[options.geometry].experts
    assert experts is not None
    if not (source / "config.json").exists():
        sizes = {"num_hidden_layers": options.layers, experts.field: options.count or experts.count(config)}
        write_random(source, config | sizes | ({"vocab_size": options.vocabulary} if options.vocabulary else {}))
    patterns = [f"layers.*.mlp.experts.{number}.*" for number in range(options.experts)]
    text = {} if options.method is None else calibrated_on(source, options)
    made = plan_conversion(
        source, Conversion.of(keep=0.6, targets=patterns, share_experts=options.share_experts, **text)
    )
    chosen = [word for pattern in patterns for word in ("--targets", pattern)]
    arguments = ["svdconvert", str(source), "--keep", "0.6", "--out", str(options.out / "made"), "--overwrite"]
    arguments += ["--device", "cpu", "--workers", "1", *chosen, *["--share-experts"] * options.share_experts]
    ways = [
        (["--no-check"], "without the check", made.solving_bytes()),
        ([], "with the check that runs tokens through the result", made.peak_bytes()),
    ]
    if text:
        known = text["calibration"]
        arguments += ["--method", options.method, "--calib", known.text, "--calib-batch-size", str(known.batch_size)]
        arguments += ["--calib-samples", str(known.samples), "--calib-length", str(known.length)]
        ways = [([], f"{options.method} on {known.samples * known.length:,} tokens", made.peak_bytes())]
    print(f"{sum(len(target.parts) for target in made.targets)} matrices are factored, all others copied")
    for more, what, planned in ways:
        # from a small process, see measure.py
        told = subprocess.check_output([sys.executable, "-c", MEASURE, *arguments, *more], text=True)
        seconds, cpu, highest = map(float, told.split()[-3:])
        figures = f"highest memory {highest / 1e9:.3f} GB, planned {planned / 1e9:.3f} GB"
        print(f"{what}: {seconds:.0f} s, {cpu:.0f} of CPU, {figures}", flush=True)


def calibrated_on(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A text of random words, and the method; the model gets a tokenizer of the published size, made up as well."""
    from svdconvert import Calibration

    draw, vocabulary = random.Random(0), json.loads((source / "config.json").read_text())["vocab_size"]
    if not (source / "tokenizer.json").exists():
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens, merges = dict(zip(alphabet, range(len(alphabet)), strict=True)), []
        letters, known = [symbol for symbol in alphabet if symbol.isalpha()], list(alphabet)
        while len(tokens) < vocabulary - 1:
            pair = draw.choice(known), draw.choice(letters)
            if "".join(pair) not in tokens:
                tokens["".join(pair)] = len(tokens)
                known.append("".join(pair))
                merges.append(pair)
        tokens["<|endoftext|>"] = len(tokens)
        tokenizer = Tokenizer(models.BPE(tokens, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.save(str(source / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    lines = [" ".join(draw.choices(words, k=300)) for _ in range(max(20, options.samples * options.length // 100))]
    (options.out / "text.txt").write_text("\n\n".join(lines))
    text = Calibration(
        str(options.out / "text.txt"), samples=options.samples, length=options.length, batch_size=options.batch_size
    )
    return {"calibration": text, "method": options.method}


def groups(options: argparse.Namespace) -> None:
    """Time the statistics of a small mixture: all at once, in groups, and with one expert's weights in memory."""
    from svdconvert.calibration.run import StatisticsRun
    from svdconvert.calibration.text import CalibrationTokens
    from svdconvert.methods.statistics import Needs
    from svdconvert.planning import expert_groups
    from svdconvert.storage.source import LocalSource

    torch.set_num_threads(1)
    sizes = {"hidden_size": 1024, "moe_intermediate_size": 384, "num_experts": 32, "num_hidden_layers": 1}
    source = options.out / "small"
    if not (source / "config.json").exists():
        write_random(source, QWEN | sizes | {"num_attention_heads": 16, "vocab_size": 4096})
    model = LocalSource(source)
    modules = [name[6:-7] for name in model.tensors if name.endswith("_proj.weight")]
    ids = torch.randint(4096, (options.samples, options.length), generator=torch.Generator().manual_seed(0))
    text = CalibrationTokens(ids, torch.ones_like(ids, dtype=torch.bool), 0, ids.numel())
    ways = {"at once": (2**40, 2**40), "in groups": (2**26, 2**40), "in groups, experts one by one": (2**26, 0)}
    for method, needs in (("whiten", Needs(True)), ("kfac", Needs(True, True))):

        def run(bounds: tuple[int, int], needs: Needs = needs, exact: bool = method == "whiten") -> None:
            expert_groups.ON_CPU, expert_groups.WEIGHTS_ON_CPU = bounds
            work = options.out / "work"
            shutil.rmtree(work, ignore_errors=True)
            for _ in StatisticsRun(model, text, needs, modules, work=work, batch_size=4, exact=exact):
                pass

        found = in_turn({name: partial(run, bounds) for name, bounds in ways.items()}, options.rounds)
        told = "; ".join(f"{name} {seconds:.1f} s" for name, seconds in found.items())
        print(f"{method}, CPU time, {ids.numel():,} tokens: {told}", flush=True)


def solver(options: argparse.Namespace) -> None:
    """Time the three matrices of one expert beside ``torch.linalg.svd``."""
    from svdconvert.factoring.operations import OPERATIONS
    from svdconvert.linalg.panels import Workspace
    from svdconvert.planning.steps import Step
    from svdconvert.tensors import TensorInfo

    torch.set_num_threads(1)
    hidden, inner, workspace = QWEN["hidden_size"], QWEN["moe_intermediate_size"], Workspace()
    rank = int(0.6 * hidden * inner / (hidden + inner))
    generator = torch.Generator().manual_seed(0)
    shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    weights = [(0.02 * torch.randn(shape, generator=generator)).bfloat16() for shape in shapes.values()]
    steps = [
        Step(
            "factorize",
            name,
            (TensorInfo(f"{name}.weight", "BF16", shape),),
            (TensorInfo(f"{name}.down.weight", "BF16", (rank, shape[1])),),
            {"rank": rank, "layout": "balanced"},
        )
        for name, shape in shapes.items()
    ]
    found = in_turn(
        {
            "ours": lambda: [
                OPERATIONS[step.kind]([weight], step, workspace) for step, weight in zip(steps, weights, strict=True)
            ],
            "torch.linalg.svd": lambda: [torch.linalg.svd(weight.float(), full_matrices=False) for weight in weights],
        },
        options.rounds,
    )
    ours, theirs = found.values()
    print(
        f"an expert's three matrices at rank {rank}: {ours:.3f} s of CPU, {theirs:.3f} s by torch.linalg.svd "
        f"({theirs / ours:.2f} x), median of {options.rounds}"
    )


MEASURE = """
import sys
from tests.benchmarks.measure import run
found = run(sys.argv[1:])
print(found.wall, found.cpu, found.peak_bytes)
"""


def in_turn(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median CPU time of each of some things to do, in seconds; every round does all of them, after one that is not
    counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for count in range(rounds + 1):
        for name, work in ways.items():
            began = time.process_time()
            work()
            if count:
                times[name].append(time.process_time() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def speed(options: argparse.Namespace) -> None:
    """Time the experts of the modeling file at equal multiplications, and at fewer, beside those of transformers."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from svdconvert.modeling import modeling_qwen3_moe_svd as modeling

    torch.set_num_threads(1)
    hidden, inner = options.hidden, options.inner
    sizes = {"num_experts": options.experts, "num_experts_per_tok": options.choices}
    config = Qwen3MoeConfig(hidden_size=hidden, moe_intermediate_size=inner, **sizes)
    with torch.device("meta"):
        block = Qwen3MoeSparseMoeBlock(config).eval()
    generator = torch.Generator().manual_seed(0)

    def filled(module: torch.nn.Module) -> torch.nn.Module:
        module.to_empty(device="cpu")
        for parameter in module.parameters():
            parameter.data.normal_(std=0.02, generator=generator)
        return module

    stacked, act_fn = filled(block).experts, block.experts.act_fn
    ways: dict[str, torch.nn.Module] = {"grouped_mm": stacked, "batched_mm": stacked, "eager": stacked}
    for share in (1.0, 0.6):
        rank = int(share * inner * hidden / (inner + hidden))
        with torch.device("meta"):
            factored = modeling.Experts(modeling.Expert(hidden, inner, act_fn) for _ in range(options.experts))
            for expert in factored:
                for name in ("gate_proj", "up_proj", "down_proj"):
                    dense = getattr(expert, name)
                    setattr(expert, name, modeling.SVDLinear(dense.in_features, dense.out_features, rank, bias=False))
        ways[f"factored, {share:.0%}"] = filled(factored).eval()
        # what a model of them does for answers token by token
        laid_out = copy.deepcopy(factored)
        ways[f"factored, {share:.0%}, for_decoding()"] = modeling._Factored.for_decoding(laid_out)
    for tokens in options.tokens:
        given = torch.randn(1, tokens, hidden, generator=generator)

        def run(name: str, given: torch.Tensor = given) -> None:
            block.experts = ways[name]
            stacked.config._experts_implementation = name
            block(given)

        # it copies the weights of every choice of every token
        chosen = [name for name in ways if name != "batched_mm" or tokens <= 8]
        with torch.no_grad():
            found = in_turn({name: partial(run, name) for name in chosen}, options.rounds)
        told = "; ".join(f"{name} {1000 * value:.1f}" for name, value in found.items())
        print(f"{tokens} tokens, ms of CPU: {told}", flush=True)


def write_random(folder: Path, config: dict[str, Any]) -> None:
    """Random weights in the names, types and sizes of the published files, a file for each layer."""
    from safetensors.torch import save_file

    from svdconvert.families.table import ARCHITECTURES

    folder.mkdir(parents=True)
    row, generator = ARCHITECTURES[config["model_type"]], torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for name, shape in row.parameters(config).items():
        file = files.setdefault(f"model-{name.split('.')[2] if '.layers.' in name else 'rest'}.safetensors", {})
        if "quantization_config" in config and ".experts." in name:
            continue  # stacked below
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        file[name] = tensor.normal_(std=0.02, generator=generator) if len(shape) > 1 else tensor.fill_(1)
    if "quantization_config" in config:
        for layer in range(config["num_hidden_layers"]):
            files[f"model-{layer}.safetensors"] |= packed_experts(config, layer, generator)
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    for file, tensors in files.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("train")
    one.add_argument("--text", type=Path, required=True, help="TinyStories, stories separated by <|endoftext|>")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--steps", type=int, default=400)
    one.add_argument("--lr", type=float, default=4e-3)
    one.add_argument("--seed", type=int, default=1234)
    one.set_defaults(run=train)
    one = commands.add_parser("quality")
    one.add_argument("--folder", type=Path, required=True, help="what `train` has written")
    one.add_argument("--keep", type=float, nargs="+", default=[0.6])
    one.add_argument("--samples", type=int, default=128)
    one.set_defaults(run=quality)
    one = commands.add_parser("memory")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--geometry", choices=GEOMETRIES, default="qwen3_moe")
    one.add_argument("--layers", type=int, default=1)
    one.add_argument("--count", type=int, help="experts of a layer; as published if it is not given")
    one.add_argument("--experts", type=int, default=10, help="of each layer, that are factored")
    one.add_argument("--vocabulary", type=int, help="tokens; as published if it is not given")
    one.add_argument("--share-experts", action="store_true")
    one.add_argument("--method", choices=("whiten", "kfac"), help="calibrate; none by default")
    one.add_argument("--samples", type=int, default=8, help="sequences of the text")
    one.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    one.add_argument("--batch-size", type=int, default=1, help="sequences at a time")
    one.set_defaults(run=memory)
    one = commands.add_parser("groups")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--samples", type=int, default=16, help="sequences of the text")
    one.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(run=groups)
    one = commands.add_parser("solver")
    one.add_argument("--rounds", type=int, default=9)
    one.set_defaults(run=solver)
    one = commands.add_parser("speed")
    one.add_argument("--experts", type=int, default=64)
    one.add_argument("--choices", type=int, default=8, help="experts that a token passes")
    one.add_argument("--hidden", type=int, default=QWEN["hidden_size"])
    one.add_argument("--inner", type=int, default=QWEN["moe_intermediate_size"])
    one.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    one.add_argument("--rounds", type=int, default=7)
    one.set_defaults(run=speed)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()

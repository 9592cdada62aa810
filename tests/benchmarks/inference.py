"""Using the result: dense against factored layers, at the geometry of polyglot-ko or of TinyLlama with few layers.

    python -m tests.benchmarks.inference --model 1.3b --layers 2
    python -m tests.benchmarks.inference --model 1.3b --layers 2 --batch 1 8 --compile --repeats 5
    python -m tests.benchmarks.inference --model llama-1.1b --layers 2 --cpu-time --train-steps 0

Random weights, since time does not depend on values. The vocabulary is cut with the layers, so that the head, which is
never factored, has the share of the work that it has in the whole model. The dense model and both layouts (balanced at
the given rank; pivoted at the rank of the same size, and at the same rank; layers that the rank does not make smaller
stay dense) live in one process and are measured in turn within each round; medians over the rounds. In float32 on the
CPU there are also both layouts after ``for_decoding``, and the dense model with its blocks multiplied by the routine
that factored layers choose, which tells the gain of fewer bytes from that of the routine. Prefill is
one pass over the prompt; decoding is token by token after it, with the key-value cache. With ``--cpu-time`` they are
those of the process, not the clock: with one thread on a busy machine, they alone can be trusted. A training step is
forward, backward and AdamW on the whole model, in a process of its own, so that its peak memory is its own, likewise in
turn; its figures are medians over the rounds. Bytes are those of the parameters. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

from .geometry import MODELS as POLYGLOTS
from .geometry import Geometry, resized
from .harness import new_parser, page
from .llama import LLAMAS, Llama
from .measure import machine, markdown_table, repeated, run, save

VARIANTS = ("dense", "balanced", "pivoted", "pivoted, same rank")
FOR_DECODING = ("balanced, for decoding", "pivoted, for decoding")
DENSE_ONEDNN = "dense, by oneDNN"
MODELS: dict[str, Geometry | Llama] = {**POLYGLOTS, **LLAMAS}


def equal_rank(shape: tuple[int, int], rank: int) -> int:
    """The pivoted rank that stores as much as a balanced one: r (m + n - r) <= rank (m + n)."""
    m, n = shape
    return max(r for r in range(rank, min(m, n) + 1) if r * (m + n - r) <= rank * (m + n))


def factored_ranks(geometry: Geometry | Llama, rank: int, layout: str, same: bool) -> dict[str, int]:
    """The rank of each layer that becomes smaller at `rank`, as the converter chooses them; see :func:`equal_rank`."""
    pays = {name: (m, n) for name, (m, n) in geometry.linears.items() if rank * (m + n) < m * n}
    return {
        f"layers.{layer}.{name}": equal_rank(shape, rank) if layout == "pivoted" and not same else rank
        for layer in range(geometry.layers)
        for name, shape in pays.items()
    }


def build(geometry: Geometry | Llama, variant: str, rank: int, dtype: str) -> Any:
    """A model with random weights.

    Args:
        geometry: its sizes.
        variant: one of :data:`VARIANTS` or :data:`FOR_DECODING`, or :data:`DENSE_ONEDNN`.
        rank: of the balanced layers.
        dtype: torch type of the weights.
    """
    import torch
    import transformers

    if isinstance(geometry, Llama):
        from svdconvert.modeling import modeling_llama_svd as modeling

        stock, factored = "Llama", "LlamaSVD"
    else:
        from svdconvert.modeling import modeling_polyglot_svd as modeling

        stock, factored = "GPTNeoX", "PolyglotSVD"
    fields = {key: value for key, value in geometry.config.items() if key not in ("architectures", "model_type")}
    fields |= {"num_hidden_layers": geometry.layers, "vocab_size": geometry.vocab, "attn_implementation": "sdpa"}
    if variant in ("dense", DENSE_ONEDNN):
        config = getattr(transformers, f"{stock}Config")(**fields)
        model = getattr(transformers, f"{stock}ForCausalLM")(config)
    else:
        layout, _, how = variant.partition(", ")
        ranks = factored_ranks(geometry, rank, layout, how == "same rank")
        config = getattr(modeling, f"{factored}Config")(**fields, svd_ranks=ranks, svd_layout=layout)
        model = getattr(modeling, f"{factored}ForCausalLM")(config)
    model = model.to(getattr(torch, dtype)).eval()
    if variant == DENSE_ONEDNN:
        for linear in model.base_model.layers.modules():
            if isinstance(linear, torch.nn.Linear):
                linear.forward = partial(modeling._apply, copy.copy(linear))
    return model.for_decoding() if variant in FOR_DECODING else model


def weight_bytes(model: Any) -> tuple[int, int]:
    """Bytes of all parameters, and of those in the blocks."""
    blocks = sum(p.numel() * p.element_size() for p in model.base_model.layers.parameters())
    return sum(p.numel() * p.element_size() for p in model.parameters()), blocks


def runner(
    model: Any, compiled: bool, device: str, batch: int, prompt: int, tokens: int, seconds: Callable[[], float]
) -> Callable[[], Any]:
    """A function that reads a prompt and decodes, and gives the seconds of both.

    Uncompiled models use the usual growing cache; compiled ones a cache of fixed size, as generation does then, so
    that nothing is compiled a second time.
    """
    import torch
    from transformers import DynamicCache, StaticCache

    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=device)
    # All variants share the code of their forward pass; beyond the usual limit they would run uncompiled.
    torch._dynamo.config.recompile_limit = 64
    call = torch.compile(model, dynamic=False) if compiled else model

    def clock() -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        return seconds()

    def once() -> tuple[float, float]:
        length = prompt + tokens + 1
        cache = StaticCache(config=model.config, max_cache_len=length) if compiled else DynamicCache()
        with torch.no_grad():
            start = clock()
            out = call(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            middle = clock()
            for _ in range(tokens):
                token = out.logits[:, -1:].argmax(-1)
                out = call(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
            return middle - start, clock() - middle

    return once


def measure_inference(
    models: dict[str, Any],
    *,
    batches: Sequence[int],
    prompt: int,
    tokens: int,
    repeats: int,
    compiled: Sequence[bool],
    device: str,
    clock: Callable[[], float],
) -> list[dict[str, Any]]:
    """Tokens per second of every variant, in turn, and how many times the dense ones they are."""
    rows = []
    for batch in batches:
        for compile_it in compiled:
            runners = {n: runner(m, compile_it, device, batch, prompt, tokens, clock) for n, m in models.items()}
            for once in runners.values():
                once()  # warm caches, or compile
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
            for _ in range(repeats):
                for name, once in runners.items():
                    seconds[name].append(once())
            middle = {name: [median(pair[i] for pair in pairs) for i in (0, 1)] for name, pairs in seconds.items()}
            for name, (prefill, decode) in middle.items():
                rows.append(
                    {
                        "variant": name,
                        "batch": batch,
                        "compiled": compile_it,
                        "prefill_tokens_per_s": batch * prompt / prefill,
                        "decode_tokens_per_s": batch * tokens / decode,
                        "prefill_faster": middle["dense"][0] / prefill,
                        "decode_faster": middle["dense"][1] / decode,
                        "seconds": seconds[name],
                    }
                )
    return rows


def train(geometry: Geometry | Llama, variant: str, rank: int, steps: int, length: int, device: str) -> dict[str, Any]:
    """Seconds of a full training step in float32, and the peak memory of this process."""
    import torch

    from svdconvert.machine.memory import peak_memory_bytes

    torch.manual_seed(0)
    model = build(geometry, variant, rank, "float32").to(device).train()
    optimiser = torch.optim.AdamW(model.parameters())
    ids = torch.randint(0, geometry.vocab, (1, length), device=device)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        model(ids, labels=ids).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else peak_memory_bytes()
    # The first step makes the optimiser's state.
    return {"variant": variant, "step_s": median(seconds[1:]), "peak_bytes": peak}


def benchmark(options: argparse.Namespace, geometry: Geometry | Llama, rank: int) -> dict[str, Any]:
    """Everything, in turn."""
    import torch

    torch.manual_seed(0)
    on_cpu = (options.device, options.dtype) == ("cpu", "float32")
    variants = options.variants or VARIANTS + ((*FOR_DECODING, DENSE_ONEDNN) if on_cpu else ())
    models = {name: build(geometry, name, rank, options.dtype).to(options.device) for name in variants}
    sizes = {name: weight_bytes(model) for name, model in models.items()}
    rows = measure_inference(
        models,
        batches=options.batch,
        prompt=options.prompt,
        tokens=options.tokens,
        repeats=options.repeats,
        compiled=[False, True] if options.compile else [False],
        device=options.device,
        clock=time.process_time if options.cpu_time else time.perf_counter,
    )
    del models
    return {
        "machine": machine(),
        "model": options.model,
        "hidden": geometry.hidden,
        "layers": geometry.layers,
        "rank": rank,
        "dtype": options.dtype,
        "device": options.device,
        "threads": torch.get_num_threads(),
        "prompt": options.prompt,
        "tokens": options.tokens,
        "repeats": options.repeats,
        "cpu_time": options.cpu_time,
        "load": [round(value, 2) for value in os.getloadavg()],
        "bytes": {name: {"all": all_, "blocks": blocks} for name, (all_, blocks) in sizes.items()},
        "inference": rows,
        "training": training_in_turn(options, geometry, rank) if options.train_steps else [],
    }


def training_in_turn(options: argparse.Namespace, geometry: Geometry | Llama, rank: int) -> list[dict[str, Any]]:
    """Medians of every variant's step and peak memory, and all rounds' steps."""
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
    for _ in range(options.repeats):
        for name, runs in rounds.items():
            line = ["tests.benchmarks.inference", "--model", options.model, "--layers", str(geometry.layers)]
            line += ["--hidden", str(geometry.hidden), "--vocab", str(geometry.vocab), "--rank", str(rank)]
            line += ["--train", name, "--train-steps", str(options.train_steps), "--device", options.device]
            runs.append(json.loads(run([*line, "--train-length", str(options.train_length)]).output))
    middle = {
        name: {key: median(one[key] for one in runs) for key in ("step_s", "peak_bytes")}
        for name, runs in rounds.items()
    }
    dense = middle["dense"]["step_s"]
    return [
        {"variant": name, **row, "faster": dense / row["step_s"], "steps": [one["step_s"] for one in rounds[name]]}
        for name, row in middle.items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """Tables of bytes, tokens per second and training steps, each with its ratio to dense."""
    heads = ["batch, compiled", "variant", "prefill tokens/s", "against dense", "decode tokens/s", "against dense"]
    rows = []
    for row in result["inference"]:
        line = [f"{row['batch']}, {'yes' if row['compiled'] else 'no'}", row["variant"]]
        for kind in ("prefill", "decode"):
            line += [f"{row[f'{kind}_tokens_per_s']:,.1f}", f"{row[f'{kind}_faster']:.2f}x"]
        rows.append(line)
    steps = {row["variant"]: row for row in result["training"]}
    size_rows = []
    for name, size in result["bytes"].items():
        line = [name, f"{size['all'] / 1e6:,.1f}", f"{size['blocks'] / 1e6:,.1f}"]
        line.append(f"{size['blocks'] / result['bytes']['dense']['blocks']:.3f}")
        step = steps.get(name)
        line += [f"{step['step_s']:.2f}", f"{step['faster']:.2f}x"] if step else ["", ""]
        line.append(f"{step['peak_bytes'] / 1e6:,.0f}" if step else "")
        size_rows.append(line)
    size_heads = ["variant", "MB of weights", "in the blocks", "against dense", "training step s", "faster", "peak MB"]
    title = (
        f"{result['model']}, hidden size {result['hidden']}, {result['layers']} layers, rank {result['rank']}, "
        f"{result['dtype']} on {result['device']}, {result['threads']} threads; prompt {result['prompt']}, "
        f"{result['tokens']} tokens decoded, {'CPU' if result['cpu_time'] else 'wall'} time, "
        f"{repeated(result['repeats'])}; load average {result['load'][0]:.1f}"
    )
    return page(result, title, markdown_table(heads, rows), markdown_table(size_heads, size_rows))


def main() -> None:
    """Command line."""
    parser = new_parser("inference", repeats=3)
    parser.add_argument("--model", choices=MODELS, default="1.3b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=0, help="another hidden size")
    parser.add_argument("--vocab", type=int, default=0, help="another vocabulary size  [default: cut with the layers]")
    parser.add_argument("--rank", type=int, default=0, help="default: a quarter of the hidden size")
    parser.add_argument("--dtype", default="float32", help="torch type of the weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16, help="tokens to decode")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process instead of the clock's")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--variants", nargs="+", metavar="NAME", help="only these, dense first  [default: all]")
    parser.add_argument("--train-steps", type=int, default=2, help="0 leaves training out")
    parser.add_argument("--train-length", type=int, default=128, help="tokens of the training sequence")
    parser.add_argument("--train", choices=VARIANTS, help="only this variant's training step, as JSON")
    options = parser.parse_args()
    whole = MODELS[options.model]
    vocab = options.vocab or max(whole.vocab * options.layers // whole.layers, 1)
    geometry = resized(whole, hidden=options.hidden, layers=options.layers, vocab=vocab)
    rank = options.rank or geometry.hidden // 4
    if options.train:
        found = train(geometry, options.train, rank, options.train_steps, options.train_length, options.device)
        print(json.dumps(found))
        return
    result = benchmark(options, geometry, rank)
    save(options.out, f"inference-{options.model}", result, markdown(result))


if __name__ == "__main__":
    main()

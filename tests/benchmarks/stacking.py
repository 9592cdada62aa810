"""Products that share an input: `down` of q, k and v, and of gate and up, one by one against stacked into one matrix.

    python -m tests.benchmarks.stacking
    OMP_NUM_THREADS=1 python -m tests.benchmarks.stacking --cpu-time

The seven projections of a LLaMA block whose keys and values have all heads (hidden size 2,048, inner size 5,632), each
of one rank, so that there is as much to stack as there can be. Both ways compute all products of the block, in turn
within each round, on the weights of as many blocks as it takes to leave the caches; medians over the rounds. Both have
the same memory: the single matrices are slices of the stacked ones. Nothing else of a block is computed, so the gain of
a whole block is smaller. Writes JSON and Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from .harness import new_parser, page
from .llama import Llama
from .measure import machine, markdown_table, repeated, save

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
ALONE = ("o_proj", "down_proj")
GEOMETRY = Llama("multi-head", 2048, 0, 16, 16, 5632)


def blocks(count: int, rank: int, geometry: Llama) -> list[dict[str, Any]]:
    """`count` blocks: stacked `down` of each group, `down` of each projection (slices of those) and `up`."""
    import torch

    shapes = {name.rpartition(".")[2]: shape for name, shape in geometry.linears.items()}
    found = []
    for _ in range(count):
        block: dict[str, Any] = {"stacked": {}, "down": {}, "up": {}}
        for group in GROUPS:
            block["stacked"][group] = torch.randn(rank * len(group), geometry.hidden)
            block["down"] |= dict(zip(group, block["stacked"][group].split(rank), strict=True))
        for name in ALONE:
            block["down"][name] = torch.randn(rank, shapes[name][1])
        for name, (outputs, _) in shapes.items():
            block["up"][name] = torch.randn(outputs, rank)
        found.append(block)
    return found


def separate(block: dict[str, Any], inputs: dict[str, Any], multiply: Callable[..., Any]) -> None:
    """All products of the block, one by one."""
    for name, down in block["down"].items():
        multiply(multiply(inputs[name], down), block["up"][name])


def stacked(block: dict[str, Any], inputs: dict[str, Any], multiply: Callable[..., Any]) -> None:
    """All products of the block, each input multiplied once."""
    for group, down in block["stacked"].items():
        latents = multiply(inputs[group[0]], down).chunk(len(group), -1)
        for name, z in zip(group, latents, strict=True):
            multiply(z, block["up"][name])
    for name in ALONE:
        multiply(multiply(inputs[name], block["down"][name]), block["up"][name])


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows: tokens, routine, and the medians of microseconds a block of both ways."""
    import torch
    from svdconvert.modeling.modeling_llama_svd import _onednn

    torch.manual_seed(0)
    clock = time.process_time if options.cpu_time else time.perf_counter
    every, rows = blocks(options.blocks, options.rank, GEOMETRY), []
    for tokens in options.tokens:
        hidden, inner = torch.randn(1, tokens, GEOMETRY.hidden), torch.randn(1, tokens, GEOMETRY.inner)
        inputs = {name: inner if name == "down_proj" else hidden for group in (*GROUPS, ALONE) for name in group}
        for routine, multiply in (("MKL", torch.nn.functional.linear), ("oneDNN", _onednn)):
            seconds: dict[str, list[float]] = {"separate": [], "stacked": []}
            for _ in range(options.repeats + 1):
                for way in (separate, stacked):
                    start = clock()
                    for block in every:
                        way(block, inputs, multiply)
                    seconds[way.__name__].append((clock() - start) / len(every) * 1e6)
            middle = {way: median(taken[1:]) for way, taken in seconds.items()}
            rows.append({"tokens": tokens, "routine": routine, **middle, "rounds": seconds})
    return rows


def markdown(result: dict[str, Any]) -> str:
    """A table of both ways."""
    heads = ["tokens", "routine", "one by one, us a block", "stacked", "faster"]
    lines = []
    for row in result["rows"]:
        apart, together = row["separate"], row["stacked"]
        figures = (f"{apart:,.0f}", f"{together:,.0f}", f"{apart / together:.3f}x")
        lines.append([str(row["tokens"]), row["routine"], *figures])
    title = (
        f"rank {result['rank']}, {result['threads']} threads, {'CPU' if result['cpu_time'] else 'wall'} time, "
        f"{repeated(result['repeats'])}"
    )
    return page(result, title, markdown_table(heads, lines))


def main() -> None:
    """Command line."""
    parser = new_parser("stacking", repeats=9)
    parser.add_argument("--rank", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 128])
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of the process instead of the clock's")
    options = parser.parse_args()
    import torch

    with torch.inference_mode():
        rows = measure(options)
    names = ("rank", "blocks", "cpu_time", "repeats")
    settings = {name: getattr(options, name) for name in names}
    result = {"machine": machine(), **settings, "threads": torch.get_num_threads(), "rows": rows}
    save(options.out, "stacking", result, markdown(result))


if __name__ == "__main__":
    main()

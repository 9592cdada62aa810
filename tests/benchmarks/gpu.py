"""Everything that is to be measured on a GPU, in one call.

    python -m tests.benchmarks.gpu                     # about 20 minutes, 16 GB of disk, 24 GB of GPU memory
    python -m tests.benchmarks.gpu --parts conversion qlora
    python -m tests.benchmarks.gpu --device cpu --small    # whether everything runs

* ``conversion``: polyglot-ko 3.8B's geometry from files to files with one, two and four workers, and
  ``torch.linalg.svd`` of some of its layers on the same card, extrapolated;
* ``stacks``: small matrices one by one and several at a time;
* ``filtered``: the exact solver, its eigenproblem and the fast solver, which is not used on a GPU until it is known to
  pay there;
* ``calibrated``: 1.3B by its text (``kfac``), 131,072 tokens, from nothing to finished files;
* ``agreement``: the same small conversions on the CPU and on the GPU: how far their products are from each other;
* ``inference``: dense against factored layers in half precision, with and without torch.compile, and training steps;
* ``qlora``: a 4-bit factored model (nf4, double quantisation) with LoRA: a few training steps, where bitsandbytes is.

Every part runs in processes of its own, and one that fails is told without keeping the others from running; the exit
code is then 1. Weights are random (``geometry``), text is drawn from the bundled model's. JSON and Markdown are written
anew after every part, so that what was measured stays where time runs out.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import conversion
from .geometry import MODELS, Geometry, resized
from .harness import BUNDLED, add_tokenizer, new_parser, write_checkpoint
from .measure import machine, machine_line, markdown_table, run, save

# Relative distance of two products, GPU and CPU, that rounding to the storage type explains. The singular vectors of
# close singular values may turn; their product may not.
TOLERANCE = 1e-2


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        large: model of the plain conversion.
        medium: model of everything else.
        sampled: layers of ``large`` that the full SVD does.
        tokens, length: of the calibration.
        layers: of the models of ``agreement``, ``inference`` and ``qlora``.
    """

    large: Geometry
    medium: Geometry
    sampled: int
    tokens: int
    length: int
    layers: int


FULL = Sizes(MODELS["3.8b"], MODELS["1.3b"], 2, 131_072, 2048, 8)
# The tokenizer of the bundled model has 4,000 tokens; the 4-bit kernels of CPUs want multiples of 64 in the rank.
SMALL = Sizes(
    resized(MODELS["3.8b"], hidden=256, layers=2, vocab=4096),
    resized(MODELS["1.3b"], hidden=256, layers=2, vocab=4096),
    1,
    1024,
    64,
    2,
)

Lines = list[tuple[str, str]]

WORKERS = (1, 2, 4)
STACK, STACK_SIDES = 16, (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Bench:
    """What parts are given."""

    sizes: Sizes
    device: str
    scratch: Path

    def checkpoint(self, geometry: Geometry, name: str) -> Path:
        """A checkpoint of random weights with a tokenizer; written once."""
        folder = self.scratch / name
        if not (folder / "tokenizer.json").exists():
            write_checkpoint(geometry, folder)
            add_tokenizer(folder)
        return folder

    def few_layers(self) -> Path:
        """The middle model with few layers."""
        return self.checkpoint(resized(self.sizes.medium, layers=self.sizes.layers), "few-layers")

    def text(self) -> Path:
        """More text than is asked for, the bundled model's in a random order."""
        lines = (BUNDLED / "calibration.txt").read_text(encoding="utf-8").splitlines()
        choice, path, written = random.Random(0), self.scratch / "text.txt", 0
        with path.open("w", encoding="utf-8") as handle:
            while written < 8 * self.sizes.tokens:  # a token is about two characters
                written += handle.write(choice.choice(lines) + "\n")
        return path

    def convert(self, source: Path, out: Path, *options: str, device: str | None = None) -> dict[str, Any]:
        """Convert without the self-check; the report, with what was measured from outside."""
        line = ["svdconvert", str(source), "--out", str(out), "--device", device or self.device, "--no-check", "--json"]
        measured = run([*line, *options])
        return json.loads(measured.output) | {"wall_s": measured.wall, "host_peak_bytes": measured.peak_bytes}

    def child(self, task: str, *arguments: object) -> Any:
        """One of :data:`CHILDREN` in a process of its own, which alone imports torch."""
        line = ["tests.benchmarks.gpu", "--device", self.device, "--child", task, *map(str, arguments)]
        return json.loads(run(line).output.splitlines()[-1])


def plain(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """The plain conversion against full SVDs on the same device."""
    geometry = bench.sizes.large
    found = conversion.benchmark(
        geometry,
        geometry.hidden // 4,
        bench.scratch,
        sampled=bench.sizes.sampled,
        workers=WORKERS,
        options=["--no-check"],
        device=bench.device,
    )
    (theirs,) = found["full_svd"]
    svd = theirs["layer_s"] * geometry.layers
    lines = [(f"torch.linalg.svd of all {geometry.layers} layers of {geometry.name}, extrapolated, s", f"{svd:.1f}")]
    for count, (ours,) in found["conversions"].items():
        lines += [
            (f"converted by {count} workers, s", f"{ours['wall_s']:.1f}"),
            ("the tool's own seconds, without starting Python", f"{ours['tool_seconds']:.1f}"),
            ("seconds of its solver, over all workers", f"{ours['solver_s']:.1f}"),
            ("full SVD over the whole conversion", f"{svd / ours['tool_seconds']:.1f}x"),
            ("peak host memory, MB", f"{ours['peak_bytes'] / 1e6:,.0f}"),
            ("peak GPU memory, MB", f"{ours['peak_device_bytes'] / 1e6:,.0f}"),
            ("worst excess over the best error", f"{ours['excess_worst']:.1e}"),
        ]
    lines.append(("peak GPU memory with the model on it, MB", f"{theirs['peak_device_bytes'] / 1e6:,.0f}"))
    return found, lines


def stacks(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """Small matrices, alone and in stacks."""
    found = bench.child("stacks", *(STACK_SIDES if bench.sizes is FULL else STACK_SIDES[:1]))
    return found, [
        (
            f"{4 * int(side)} x {side}: ms a matrix alone, in stacks of {STACK}; of these to be done again",
            f"{alone:.2f}, {together:.2f}; {again}",
        )
        for side, (alone, together, again) in found.items()
    ]


def calibrated(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """The two-sided method, from a text to finished files."""
    sizes, out = bench.sizes, bench.scratch / "calibrated"
    source = bench.checkpoint(sizes.medium, "medium")
    options = ["--method", "kfac", "--keep", "0.4", "--calib", str(bench.text())]
    options += ["--calib-samples", str(sizes.tokens // sizes.length), "--calib-length", str(sizes.length)]
    report = bench.convert(source, out, *options)
    record = json.loads((out / "svdconvert.json").read_text())
    shutil.rmtree(out)
    shutil.rmtree(source)
    found = {key: report[key] for key in ("seconds", "wall_s", "host_peak_bytes", "peak_device_bytes")}
    return found | {"timing": record["timing"]}, [
        (
            f"{sizes.medium.name}, {sizes.medium.layers} layers, kfac on {sizes.tokens:,} tokens, s",
            f"{report['wall_s']:.1f}",
        ),
        ("the tool's own seconds", f"{report['seconds']:.1f}"),
        ("peak host memory, MB", f"{report['host_peak_bytes'] / 1e6:,.0f}"),
        ("peak GPU memory, MB", f"{report['peak_device_bytes'] / 1e6:,.0f}"),
    ]


def agreement(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """The same conversions on the CPU and on the device."""
    source, sizes = bench.few_layers(), bench.sizes
    rank = str(sizes.medium.hidden // 4)
    calib = ["--method", "whiten", "--calib", str(bench.text())]
    calib += ["--calib-samples", str(max(sizes.tokens // sizes.length // 8, 1)), "--calib-length", str(sizes.length)]
    found: dict[str, Any] = {}
    for name, options in {
        "svd, balanced": [],
        "svd, pivoted": ["--layout", "pivoted"],
        "svd, shared by two layers": ["--share-layers", "2"],
        "whiten, balanced": calib,
    }.items():
        folders = [bench.scratch / side for side in ("on-cpu", "on-device")]
        for folder, device in zip(folders, ("cpu", bench.device), strict=True):
            bench.convert(source, folder, "--rank", rank, *options, device=device)
        found[name] = bench.child("compare", *folders)
        for folder in folders:
            shutil.rmtree(folder)
    far = {name: each["product"] for name, each in found.items() if each["product"] > TOLERANCE}
    lines = [
        (
            f"{name}: largest relative distance of two products, of two errors",
            f"{each['product']:.1e}, {each['error']:.1e}",
        )
        for name, each in found.items()
    ]
    if far:
        raise RuntimeError(f"products on the CPU and on {bench.device} differ by more than {TOLERANCE:g}: {far}")
    return found, lines


def inference(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """Prefill, decoding and training, dense against factored."""
    sizes, out = bench.sizes, bench.scratch / "inference"
    line = ["tests.benchmarks.inference", "--model", sizes.medium.name, "--layers", str(sizes.layers)]
    line += ["--hidden", str(sizes.medium.hidden), "--vocab", str(sizes.medium.vocab), "--device", bench.device]
    line += ["--prompt", str(sizes.length // 2), "--tokens", "32" if bench.device != "cpu" else "2", "--out", str(out)]
    if bench.device != "cpu":
        line += ["--dtype", "float16", "--compile", "--repeats", "5"]
    run(line)
    found = json.loads((out / f"inference-{sizes.medium.name}.json").read_text())
    dense = {(r["batch"], r["compiled"]): r for r in found["inference"] if r["variant"] == "dense"}
    lines = []
    for row in found["inference"]:
        base = dense[row["batch"], row["compiled"]]
        if row is not base:
            ratios = [f"{row[key] / base[key]:.2f}x" for key in ("prefill_tokens_per_s", "decode_tokens_per_s")]
            name = f"{row['variant']}, batch {row['batch']}{', compiled' if row['compiled'] else ''}"
            lines.append((f"{name}: prefill, decoding against dense", ", ".join(ratios)))
    lines += [
        (f"training step of {row['variant']}, s, peak MB", f"{row['step_s']:.3f}, {row['peak_bytes'] / 1e6:,.0f}")
        for row in found["training"]
    ]
    return found, lines


def qlora(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """Training LoRA on 4-bit factors."""
    if find_spec("bitsandbytes") is None or find_spec("peft") is None:
        return {}, [("QLoRA", "left out: bitsandbytes and peft are not both installed")]
    out = bench.scratch / "factored"
    bench.convert(bench.few_layers(), out, "--rank", str(bench.sizes.medium.hidden // 4))
    found = bench.child("qlora", out, bench.sizes.length)
    shutil.rmtree(out)
    return found, [
        ("losses of QLoRA steps on 4-bit factors", ", ".join(f"{loss:.2f}" for loss in found["losses"])),
        ("seconds a step", f"{found['step_s']:.3f}"),
        ("peak GPU memory, MB", f"{found['peak_device_bytes'] / 1e6:,.0f}"),
    ]


def filtered(bench: Bench) -> tuple[dict[str, Any], Lines]:
    """The fast solver against the exact one, matrix by matrix."""
    out, hidden = bench.scratch / "filtered", bench.sizes.medium.hidden
    line = ["tests.benchmarks.filtered", "--device", bench.device, "--hidden", str(hidden), "--out", str(out)]
    ranks = ["64", "128", "256", "0"] if bench.sizes is FULL else ["16", "0"]
    run([*line, "--spectrum", "llm", "--repeats", "3", "--ranks", *ranks])
    found = json.loads((out / "filtered.json").read_text())
    return found, [
        (
            f"{' x '.join(map(str, row['shape']))}, rank {row['rank']}: ms exact, its eigh, fast",
            ", ".join(f"{1000 * row[key]:.1f}" for key in ("exact_s", "eigh_s", "filtered_s") if row.get(key)),
        )
        for row in found["rows"]
    ]


PARTS: Mapping[str, Callable[[Bench], tuple[dict[str, Any], Lines]]] = {
    "conversion": plain,
    "stacks": stacks,
    "filtered": filtered,
    "calibrated": calibrated,
    "agreement": agreement,
    "inference": inference,
    "qlora": qlora,
}


def _compare(device: str, one: str, other: str) -> dict[str, float]:
    """How far two factored checkpoints are apart: their products, relative to each, and the errors they tell."""
    import torch
    from safetensors import safe_open

    from svdconvert.layouts.table import layout_of, stored_names

    folders = [Path(one), Path(other)]
    config = json.loads((folders[0] / "config.json").read_text())
    records = [json.loads((folder / "svdconvert.json").read_text())["matrices"] for folder in folders]
    largest = 0.0
    with (
        safe_open(folders[0] / "model.safetensors", "pt") as first,
        safe_open(folders[1] / "model.safetensors", "pt") as second,
    ):
        for module in config["svd_ranks"]:
            names = stored_names(config, "gpt_neox.", module)
            a, b = (layout_of(config).product([file.get_tensor(name) for name in names]) for file in (first, second))
            largest = max(largest, float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(a)))
    errors = [abs(records[0][key]["relative_error"] - records[1][key]["relative_error"]) for key in records[0]]
    return {"product": largest, "error": max(errors)}


def _stacks(device: str, *sides: str) -> dict[str, tuple[float, float, int]]:
    """Milliseconds a matrix by the smaller side, one by one and all at once; medians of five rounds in turn.

    And how many of those done at once are not good enough.
    """
    from statistics import median

    import torch

    from svdconvert.linalg.stacked import factorize_stack, settle

    found = {}
    for side in sides:
        k = int(side)
        weights = torch.randn(STACK, 4 * k, k, device=device).half()

        def alone(weights: torch.Tensor = weights, rank: int = k // 4) -> None:
            for weight in weights:
                factorize_stack(weight[None], rank, torch.float16)

        def together(weights: torch.Tensor = weights, rank: int = k // 4) -> None:
            factorize_stack(weights, rank, torch.float16)

        times: dict[Any, list[float]] = {alone: [], together: []}
        for _ in range(6):
            for way, seconds in times.items():
                start = time.perf_counter()
                way()
                if device != "cpu":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        one, all_ = (1000 * median(seconds[1:]) / STACK for seconds in times.values())  # the first is a warm-up
        stack = factorize_stack(weights, k // 4, torch.float16)
        found[side] = (one, all_, settle(weights, stack, stack.facts.cpu()).count(None))
    return found


def _qlora(device: str, folder: str, length: str) -> dict[str, Any]:
    """A few steps on one batch."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    on_gpu = device != "cpu"
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        trust_remote_code=True,
        quantization_config=quantization,
        device_map={"": device},
        torch_dtype=torch.bfloat16 if on_gpu else torch.float32,
    )
    targets = sorted({name.rpartition(".")[2] for name in model.config.svd_ranks})
    model = get_peft_model(
        prepare_model_for_kbit_training(model), LoraConfig(r=32, lora_alpha=32, target_modules=targets)
    )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if on_gpu:
        from bitsandbytes.optim import PagedAdamW32bit as optimiser_class
    else:
        from torch.optim import AdamW as optimiser_class
    optimiser = optimiser_class(parameters, lr=1e-3)
    torch.manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, int(length)), device=device)
    losses, seconds = [], []
    for _ in range(4):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))  # waits for the device
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated(device) if on_gpu else 0
    return {"losses": losses, "step_s": sorted(seconds[1:])[1], "peak_device_bytes": peak}


def _card(device: str) -> str:
    """What computes."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        return ""
    return "CPU" if device == "cpu" else f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"


CHILDREN: Mapping[str, Callable[..., Any]] = {
    "compare": _compare,
    "stacks": _stacks,
    "qlora": _qlora,
    "card": _card,
}


def markdown(result: Mapping[str, Any]) -> str:
    """A table for each part."""
    text = [f"On {result['card']}", ""]
    for name, part in result["parts"].items():
        text += [f"### {name}", ""]
        text += [f"failed: {part['failed']}", ""] if "failed" in part else [markdown_table(["", ""], part["lines"]), ""]
    return "\n".join([*text, machine_line(result["machine"])])


def main() -> None:
    """Command line."""
    parser = new_parser("gpu", scratch=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="small sizes")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, *arguments = options.child
        print(json.dumps(CHILDREN[task](options.device, *arguments)))
        return
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        bench = Bench(SMALL if options.small else FULL, options.device, Path(scratch))
        result: dict[str, Any] = {"machine": machine(), "card": bench.child("card"), "parts": {}}
        if not result["card"]:
            parser.error(f"torch sees no GPU for --device {options.device}")
        for name in options.parts:
            print(f"{name} ...", flush=True)
            try:
                found, lines = PARTS[name](bench)
                result["parts"][name] = {"lines": lines, "found": found}
            except RuntimeError as error:  # of a command: with the end of what it said
                result["parts"][name] = {"failed": str(error)}
            save(options.out, "gpu", result, markdown(result))
    if any("failed" in part for part in result["parts"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

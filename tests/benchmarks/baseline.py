"""What is compared with: the whole model in memory and a full SVD of every matrix, truncated afterwards.

    python -m tests.benchmarks.baseline CHECKPOINT --rank 512 --layers 0 12
    python -m tests.benchmarks.baseline CHECKPOINT --rank 512 --layers 0 --device cuda

This is how the common scripts do it: ``from_pretrained``, then ``torch.linalg.svd(weight.float(),
full_matrices=False)`` per linear layer. Only the layers asked for are decomposed, one of them costing as much as any
other. All weights are read once all the same, since recent versions map the files instead of loading them, and what
has not been touched yet would be missing from the peak memory. The factors of a whole run would come on top of it.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def factor_by_full_svd(weight: Any, rank: int) -> tuple[Any, Any]:
    """W ~ up @ down with the singular values shared evenly, in float32."""
    import torch

    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def factor_by_whitening(weight: Any, rank: int, right: Any, left: Any = None) -> tuple[Any, Any]:
    """The recipe of SVD-LLM (arXiv:2403.07378): Cholesky, full SVD of the whitened matrix, inverse; in float64.

    Args:
        weight: [m, n].
        rank: of the factors.
        right: [n, n], second moment of the inputs.
        left: [m, m], of the output gradients, for the same recipe on both sides; None leaves it out.

    Returns:
        ``(down, up)``, float64.
    """
    import torch

    def root(metric: Any) -> Any:
        factor, failed = torch.linalg.cholesky_ex(metric)
        damping = 1e-6 * float(metric.diagonal().mean())
        while int(failed):  # as the recipe does where the metric is singular
            factor, failed = torch.linalg.cholesky_ex(metric + damping * torch.eye(len(metric), dtype=metric.dtype))
            damping *= 10
        return factor

    inner = root(right)
    whitened = weight.double() @ inner
    outer = None if left is None else root(left)
    if outer is not None:
        whitened = outer.T @ whitened
    u, s, v = torch.linalg.svd(whitened, full_matrices=False)
    shared = s[:rank].sqrt()
    up, down = u[:, :rank] * shared, (shared[:, None] * v[:rank]) @ torch.linalg.inv(inner)
    return down, up if outer is None else torch.linalg.inv(outer).T @ up


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.baseline")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--layers", type=int, nargs="*", default=[0], help="layers to decompose")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, torch_dtype=torch.float16)
    for parameter in model.parameters():
        parameter.detach().max()
    model.to(options.device)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu:
        # What the first call of the library sets up is nobody's cost.
        torch.linalg.svd(torch.eye(256, device=options.device))
        torch.cuda.synchronize()
    loading = time.perf_counter() - start
    matrices: dict[str, dict[str, float]] = {}
    for layer in options.layers:
        for name, module in model.gpt_neox.layers[layer].named_modules():
            if not isinstance(module, torch.nn.Linear):
                continue
            wall, cpu = time.perf_counter(), time.process_time()
            down, up = factor_by_full_svd(module.weight.detach(), options.rank)
            down, up = down.half(), up.half()
            if on_gpu:
                torch.cuda.synchronize()
            matrices[f"layers.{layer}.{name}"] = {
                "seconds": round(time.perf_counter() - wall, 4),
                "cpu_seconds": round(time.process_time() - cpu, 4),
            }
    told = {"loading_s": round(loading, 2), "threads": torch.get_num_threads(), "matrices": matrices}
    told["peak_device_bytes"] = torch.cuda.max_memory_allocated(options.device) if on_gpu else 0
    print(json.dumps(told))


if __name__ == "__main__":
    main()

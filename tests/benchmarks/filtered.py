"""The package's exact solver against the fast one, a filtered subspace with a certificate.

    python -m tests.benchmarks.filtered                              # hidden sizes 2048 and 3072
    python -m tests.benchmarks.filtered --device cuda                # and 5120
    python -m tests.benchmarks.filtered --hidden 2048 --ranks 64 --spectrum gauss --repeats 5

The linear layers of a GPT-NeoX model of each hidden size, both methods in turn within each round, medians over the
rounds: CPU seconds of one thread, on a GPU wall seconds. Everything starts from the float16 weight and ends with two
float32 factors. Where the filtered subspace is not certified, its time includes the exact solution that takes its
place. ``excess`` is how far the filtered factors' error lies above the optimum of Eckart and Young, both in float64;
``certificate`` what the method itself says of it. Writes JSON and Markdown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from .geometry import MODELS, SPECTRA, Weights, resized
from .harness import new_parser, page
from .measure import machine, markdown_table, repeated, save
from .solver import error

if TYPE_CHECKING:
    from torch import Tensor

    Result = tuple[Tensor, Tensor, float | None]
    Method = Callable[[Tensor, int], Result]


def methods() -> dict[str, Method]:
    """Name -> (W, rank) -> (down, up, certificate)."""
    import torch

    from svdconvert.linalg.exact import factorize
    from svdconvert.linalg.filtered import factorize_fast
    from svdconvert.linalg.panels import Workspace

    workspace = Workspace()

    def exact(weight: Tensor, rank: int) -> Result:
        factors = factorize(weight, rank, torch.float32, workspace)
        return factors.down, factors.up, None

    def filtered(weight: Tensor, rank: int) -> Result:
        factors = factorize_fast(weight, rank, torch.float32, workspace)
        return factors.down, factors.up, factors.certificate

    return {"exact": exact, "filtered": filtered}


def clock(device: str) -> float:
    """CPU seconds of this process, or wall seconds when the GPU has done all that it was given."""
    import torch

    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def squared_singular_values(weight: Tensor) -> Tensor:
    """[k] float64, ascending."""
    import torch

    exact = weight.double()
    gram = exact.T @ exact if exact.shape[0] >= exact.shape[1] else exact @ exact.T
    return torch.linalg.eigvalsh(gram).clamp_min(0)


def eigh_seconds(weight: Tensor, repeats: int) -> float:
    """torch.linalg.eigh of the float32 Gram matrix alone on the GPU, median."""
    import torch

    single = weight.float()
    gram = single.T @ single if single.shape[0] >= single.shape[1] else single @ single.T
    seconds = []
    for _ in range(repeats):
        start = clock("cuda")
        torch.linalg.eigh(gram)
        seconds.append(clock("cuda") - start)
    return median(seconds)


def compare(
    weight: Tensor, ranks: Sequence[int], chosen: Mapping[str, Method], repeats: int, device: str
) -> list[dict[str, Any]]:
    """One row for every rank of a matrix, 0 being a quarter of its smaller side."""
    values = squared_singular_values(weight)
    eigh = {"eigh_s": round(eigh_seconds(weight, repeats), 5)} if device == "cuda" else {}
    rows = []
    for rank in dict.fromkeys(rank or min(weight.shape) // 4 for rank in ranks):
        best = float(values[:-rank].sum().sqrt())
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        excess, certificate = 0.0, None
        for turn in range(repeats):
            for name, method in chosen.items():
                start = clock(device)
                down, up, claimed = method(weight, rank)
                seconds[name].append(clock(device) - start)
                if turn == 0 and name == "filtered":
                    excess, certificate = error(weight, down, up) / best - 1, claimed
                del down, up
        row: dict[str, Any] = {"shape": list(weight.shape), "rank": rank}
        row |= {f"{name}_s": round(median(values), 5) for name, values in seconds.items()}
        row |= {"excess": excess, "certificate": certificate, "certified": certificate is not None} | eigh
        row["seconds"] = {name: [round(value, 5) for value in values] for name, values in seconds.items()}
        rows.append(row)
    return rows


def benchmark(
    hidden: Sequence[int], ranks: Sequence[int], spectra: Sequence[str], repeats: int, device: str
) -> dict[str, Any]:
    """All matrices.

    Args:
        hidden: hidden sizes.
        ranks: 0 is a quarter of the smaller side.
        spectra: see ``geometry``.
        repeats: rounds.
        device: ``cpu`` or ``cuda``.
    """
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    chosen = methods()
    for method in chosen.values():
        method(torch.randn(256, 256).to(device), 8)  # what is loaded at the first call
    rows = []
    for spectrum in spectra:
        for size in hidden:
            weights = Weights(spectrum)
            for layer, shape in resized(MODELS["1.3b"], hidden=size).linears.items():
                weight = weights.matrix(shape, layer).to(device)
                found = compare(weight, ranks, chosen, repeats, device)
                rows += [{"layer": layer, "spectrum": spectrum} | row for row in found]
    return {
        "machine": machine(),
        "card": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "repeats": repeats,
        "load": [round(value, 2) for value in os.getloadavg()],
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """One line per matrix and rank."""
    eigh = any("eigh_s" in row for row in result["rows"])
    heads = ["spectrum", "layer", "shape", "rank", "exact, s", *(["eigh alone, s"] if eigh else []), "filtered, s"]
    heads += ["faster", "excess", "certificate"]
    rows = []
    for row in result["rows"]:
        line = [row["spectrum"], row["layer"], " x ".join(map(str, row["shape"])), str(row["rank"])]
        line += [f"{row['exact_s']:.3f}", *([f"{row['eigh_s']:.3f}"] if eigh else []), f"{row['filtered_s']:.3f}"]
        line += [f"{row['exact_s'] / row['filtered_s']:.2f}x", f"{row['excess']:.1e}"]
        line.append(f"{row['certificate']:.1e}" if row["certified"] else "none, done exactly")
        rows.append(line)
    unit = "CPU seconds of one thread" if result["card"] == "CPU" else f"Wall seconds on {result['card']}"
    title = f"{unit}, {repeated(result['repeats'])}; load average at the end {result['load'][0]:.1f}"
    return page(result, title, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("filtered", repeats=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--hidden", type=int, nargs="+", help="hidden sizes (2048 3072, on a GPU also 5120)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 128, 256, 0], help="0: a quarter of the size")
    parser.add_argument("--spectrum", nargs="+", choices=SPECTRA, default=["llm", "gauss", "power"])
    options = parser.parse_args()
    from svdconvert.linalg.lapack import threads

    hidden = options.hidden or [2048, 3072] + [5120] * (options.device == "cuda")
    with threads(1):
        result = benchmark(hidden, options.ranks, options.spectrum, options.repeats, options.device)
    save(options.out, "filtered", result, markdown(result))


if __name__ == "__main__":
    main()

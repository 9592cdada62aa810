"""What a smaller cache would cost: the latent of a factored query_key_value in place of keys and values.

    python -m tests.benchmarks.latent_cache                          # 1.3B geometry, 2,048 tokens, batch 1 and 8
    python -m tests.benchmarks.latent_cache --model 3.8b --dtype bfloat16

A factored fused projection computes z = A x of r numbers, and then queries, keys and values B z + b. One block of
GPT-NeoX with random weights decodes one token on top of a full cache, in three ways that give the same output:

* ``keys and values``: the usual cache, 2 h numbers a token;
* ``latent``: z alone, r numbers; all keys and values are computed anew in every step;
* ``latent, rotary keys``: z, and the part of the keys that is rotated. The other scores are q^T B z, so that B goes to
  the side of the query, and values are summed up as latents and multiplied by B once (DeepSeek-V2's multi-head latent
  attention, arXiv:2405.04434).

CPU seconds of one thread, in turn within each round, medians over the rounds. Outputs are compared first, in float64
and small, and the benchmark fails if they differ. Writes JSON, Markdown and a picture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .geometry import Geometry
from .harness import add_sizes, chosen, new_parser, page
from .measure import machine, markdown_table, repeated, save

if TYPE_CHECKING:
    from torch import Tensor

USUAL = "keys and values"


@dataclass(frozen=True)
class Block:
    """A transformer block with factored layers.

    Attributes:
        heads, size, rotary: heads, length of one, and how many of its elements are rotated.
        a: [r, h], of query_key_value.
        b: [heads, 3, size, r], likewise: queries, keys, values of every head.
        bias: [heads, 3, size].
        others: the factors (down, up) of the block's other layers, in their order.
        cosine, sine: [positions, rotary].
    """

    heads: int
    size: int
    rotary: int
    a: Tensor
    b: Tensor
    bias: Tensor
    others: list[tuple[Tensor, Tensor]]
    cosine: Tensor
    sine: Tensor

    @classmethod
    def random(cls, geometry: Geometry, rank: int, positions: int, dtype: Any) -> Block:
        """With random weights that keep activations about as large as they are."""
        import torch

        h, heads = geometry.hidden, geometry.heads
        size = h // heads
        rotary = int(size * geometry.rotary_pct)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(shape) * shape[-1] ** -0.5).to(dtype)

        angles = torch.arange(positions)[:, None] * 10000 ** (-torch.arange(0, rotary, 2) / rotary)
        angles = torch.cat([angles, angles], -1)
        others = [(normal(rank, n), normal(m, rank)) for m, n in list(geometry.linears.values())[1:]]
        return cls(
            heads,
            size,
            rotary,
            normal(rank, h),
            normal(heads, 3, size, rank),
            normal(heads, 3, size),
            others,
            angles.cos().to(dtype),
            angles.sin().to(dtype),
        )

    def rotated(self, x: Tensor, start: int) -> Tensor:
        """The first ``rotary`` elements of [..., tokens, size or rotary], turned by their positions."""
        import torch

        part, rest = x[..., : self.rotary], x[..., self.rotary :]
        stop = start + x.shape[-2]
        one, two = part.chunk(2, -1)
        turned = part * self.cosine[start:stop] + torch.cat([-two, one], -1) * self.sine[start:stop]
        return torch.cat([turned, rest], -1)

    def heads_of(self, z: Tensor, which: slice) -> Tensor:
        """B z + b of some of queries, keys and values: [batch, tokens, r] -> [batch, heads, which, tokens, size]."""
        weight, bias = self.b[:, which], self.bias[:, which]
        flat = z @ weight.reshape(-1, weight.shape[-1]).T + bias.reshape(-1)
        return flat.view(*z.shape[:2], *bias.shape).permute(0, 2, 3, 1, 4)

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """The block's other layers, beside each other as in GPT-NeoX; without its norms."""
        import torch

        (dense, up), (inner, wide), (outer, back) = ((down.T, up.T) for down, up in self.others)
        hidden = torch.nn.functional.gelu(x @ inner @ wide)
        return x + attended @ dense @ up + hidden @ outer @ back


class Cache:
    """A full cache and the attention on top of it; a token overwrites the last place of the cache.

    Attributes:
        tensors: what is kept.
    """

    def __init__(self, block: Block, latents: Tensor) -> None:
        """Fill it.

        Args:
            block: whose attention it is.
            latents: A x of the tokens before, [batch, tokens, r], and one place more.
        """
        self.block, self.last = block, latents.shape[1] - 1
        self.tensors = self.filled(latents)

    @property
    def numbers(self) -> int:
        """How many numbers it holds for a token."""
        return sum(tensor.numel() for tensor in self.tensors) // (self.tensors[0].shape[0] * (self.last + 1))

    def filled(self, latents: Tensor) -> list[Tensor]:
        """The cache of these tokens."""
        raise NotImplementedError

    def attend(self, x: Tensor) -> Tensor:
        """The heads' outputs for one more token: [batch, 1, h] -> [batch, 1, h]."""
        raise NotImplementedError


class KeysAndValues(Cache):
    """The usual one: keys, rotated, and values, [batch, heads, tokens, size] each."""

    def filled(self, latents: Tensor) -> list[Tensor]:
        k, v = self.block.heads_of(latents, slice(1, 3)).unbind(2)
        return [self.block.rotated(k, 0).contiguous(), v.contiguous()]

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.block.heads_of(x @ self.block.a.T, slice(0, 3)).unbind(2)
        keys, values = self.tensors
        keys[:, :, self.last :] = self.block.rotated(k, self.last)
        values[:, :, self.last :] = v
        return _attention(self.block.rotated(q, self.last), keys, values)


class Latent(Cache):
    """The latents alone, [batch, tokens, r]."""

    def filled(self, latents: Tensor) -> list[Tensor]:
        return [latents.clone()]

    def attend(self, x: Tensor) -> Tensor:
        (latents,) = self.tensors
        z = x @ self.block.a.T
        latents[:, self.last :] = z
        q = self.block.heads_of(z, slice(0, 1))[:, :, 0]
        k, v = self.block.heads_of(latents, slice(1, 3)).unbind(2)
        return _attention(self.block.rotated(q, self.last), self.block.rotated(k, 0), v)


class LatentAndRotary(Cache):
    """The latents, and the rotated part of the keys, [batch, heads, tokens, rotary]."""

    def filled(self, latents: Tensor) -> list[Tensor]:
        keys = self.block.heads_of(latents, slice(1, 2))[:, :, 0]
        return [latents.clone(), self.block.rotated(keys[..., : self.block.rotary], 0).contiguous()]

    def attend(self, x: Tensor) -> Tensor:
        import torch

        block = self.block
        latents, keys = self.tensors
        z = x @ block.a.T
        latents[:, self.last :] = z
        q, k = block.heads_of(z, slice(0, 2)).unbind(2)
        keys[:, :, self.last :] = block.rotated(k[..., : block.rotary], self.last)
        rotated = block.rotated(q, self.last)
        # What b adds to the scores of the part that is not rotated is the same for all tokens, and softmax drops it.
        absorbed = torch.einsum("bhd,hdr->bhr", rotated[:, :, 0, block.rotary :], block.b[:, 1, block.rotary :])
        scores = (rotated[..., : block.rotary] @ keys.transpose(-1, -2))[:, :, 0] + absorbed @ latents.transpose(1, 2)
        weights = torch.softmax(scores * block.size**-0.5, -1)
        out = torch.einsum("bhr,hdr->bhd", weights @ latents, block.b[:, 2]) + block.bias[:, 2]
        return out.flatten(1)[:, None]


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


WAYS: Mapping[str, Callable[[Block, Any], Cache]] = {
    USUAL: KeysAndValues,
    "latent": Latent,
    "latent, rotary keys": LatentAndRotary,
}


def difference() -> float:
    """Largest relative difference of any way's output from the usual one's, in float64 at a small size."""
    import torch

    block = Block.random(Geometry("", 64, 1, 4), 16, 33, torch.float64)
    inputs = torch.randn(2, 33, 64, dtype=torch.float64)
    latents = inputs @ block.a.T
    expected, *others = (way(block, latents).attend(inputs[:, -1:]) for way in WAYS.values())
    return max(float((other - expected).abs().max() / expected.abs().max()) for other in others)


def benchmark(
    geometry: Geometry, rank: int, tokens: int, batches: list[int], repeats: int, dtype: str
) -> dict[str, Any]:
    """Seconds of a step, in turn.

    Args:
        geometry: the model.
        rank: of every layer.
        tokens: in the cache.
        batches: sequences at a time.
        repeats: rounds.
        dtype: torch type.

    Raises:
        RuntimeError: the ways do not give the same.
    """
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if (apart := difference()) > 1e-12:
        raise RuntimeError(f"outputs differ by {apart:.1e}")
    kind = getattr(torch, dtype)
    block, rows = Block.random(geometry, rank, tokens + 1, kind), []
    for batch in batches:
        latents = torch.randn(batch, tokens + 1, rank).to(kind)
        caches = {name: way(block, latents) for name, way in WAYS.items()}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in caches}
        x = torch.randn(batch, 1, geometry.hidden).to(kind)
        with torch.inference_mode():
            for turn in range(repeats + 1):
                for name, cache in caches.items():
                    start = time.process_time()
                    attended = cache.attend(x)
                    middle = time.process_time()
                    block.rest(x, attended)
                    if turn:  # the first one warms up
                        seconds[name].append((middle - start, time.process_time() - middle))
        middle = {name: median(sum(pair) for pair in pairs) for name, pairs in seconds.items()}
        for name, pairs in seconds.items():
            numbers = caches[name].numbers
            rows.append(
                {
                    "way": name,
                    "batch": batch,
                    "numbers": numbers,
                    "model_bytes": numbers * geometry.layers * tokens * batch * kind.itemsize,
                    "attention_s": median(pair[0] for pair in pairs),
                    "block_s": middle[name],
                    "slower": middle[name] / middle[USUAL],
                    "smaller": caches[USUAL].numbers / numbers,
                }
            )
    return {
        "machine": machine(),
        "model": geometry.name,
        "hidden": geometry.hidden,
        "layers": geometry.layers,
        "rank": rank,
        "tokens": tokens,
        "dtype": dtype,
        "repeats": repeats,
        "difference": apart,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """One line per batch and way."""
    heads = ["batch", "cache", "numbers a token", "MB, all layers", "smaller", "attention, ms", "block, ms", "slower"]
    rows = []
    for row in result["rows"]:
        line = [str(row["batch"]), row["way"], f"{row['numbers']:,}", f"{row['model_bytes'] / 1e6:,.0f}"]
        line += [f"{row['smaller']:.1f}x", f"{row['attention_s'] * 1e3:.2f}"]
        rows.append([*line, f"{row['block_s'] * 1e3:.2f}", f"{row['slower']:.2f}x"])
    title = (
        f"{result['model']}, hidden size {result['hidden']}, rank {result['rank']}, one token on top of "
        f"{result['tokens']:,}, {result['dtype']}, CPU time of one thread, {repeated(result['repeats'])}; outputs "
        f"differ by at most {result['difference']:.0e} in float64"
    )
    return page(result, title, markdown_table(heads, rows))


def main() -> None:
    """Command line."""
    parser = new_parser("latent_cache", repeats=9)
    add_sizes(parser, vocab=False)
    parser.add_argument("--rank", type=int, default=0, help="default: a quarter of the hidden size")
    parser.add_argument("--tokens", type=int, default=2047, help="in the cache")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", default="float32", help="torch type of weights and cache")
    options = parser.parse_args()
    geometry = chosen(options)
    rank = options.rank or geometry.hidden // 4
    result = benchmark(geometry, rank, options.tokens, options.batch, options.repeats, options.dtype)
    save(options.out, f"latent-cache-{options.model}", result, markdown(result))


if __name__ == "__main__":
    main()

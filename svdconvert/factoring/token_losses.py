"""What errors of matrices cost, token by token, where the pair of metrics takes inputs and gradients for independent.

An error E of a matrix adds (g^T E x)^2 / 2 nats at a token with input x and gradient g, to second order. g is that of
the matrix's output, of the loss for labels that are drawn from the model itself (the Fisher information). The metrics
have E[g g^T] and E[x x^T] apart (K-FAC, arXiv:1503.05671). Where tokens of large inputs have small gradients, as those
have that attention uses as a sink, their product is too high: on SmolLM2 four to five times for values and down
projections and 1.7 times for gates. That does not matter within a matrix, but between matrices it does.

One pass forward and back through the dense model measures one error of every matrix; what the same error costs in the
metrics, divided by it, then corrects all that the metrics say of the matrix. In memory are one block, its errors, and
the activations of one batch in it. The way forward and the gradient at the head's input do not depend on the errors:
they stay in files for the next ones, until the bench is tidied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from svdconvert.factoring.sampled import Bench
from svdconvert.families.row import Section
from svdconvert.fields import NUMBER, table
from svdconvert.models.activations import check_room
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.stream import Stream, Weights
from svdconvert.names import layer_number, suffix

# Sequences, and tokens that are read of each, from its beginning.
SEQUENCES, READ = 16, 256

_LOSSES = {"losses": table(NUMBER)}


class TokenLosses:
    """Losses of errors on one model and text."""

    def __init__(self, bench: Bench) -> None:
        """Prepare; nothing is computed before it is asked for."""
        self._bench = bench
        ids, mask = bench.tokens.ids, bench.tokens.mask
        some = torch.linspace(0, len(ids) - 1, min(SEQUENCES, len(ids))).round().long()
        self._ids, self._mask = ids[some, :READ], mask[some, :READ]

    def measure(
        self, modules: Sequence[str], errors: Callable[[int], Weights], key: Mapping[str, Any]
    ) -> Mapping[str, float]:
        """Module path -> what its error adds to the loss, estimated, nats per token.

        Args:
            modules: linear layers, or parts of fused ones, in blocks.
            errors: block -> path within it -> error of that matrix, [out, in], any floating type; of all modules there.
            key: what the errors depend on, in JSON types.

        Raises:
            InputError: something is NaN or infinite, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        whole = {**self._bench.key, "text": self._bench.tokens.digest, "shape": list(self._ids.shape)}
        errors_key = {**whole, "modules": list(modules), "errors": dict(key)}
        return self._bench.kept(errors_key, _LOSSES, lambda: {"losses": self._measured(modules, errors, whole)})[
            "losses"
        ]

    def _measured(
        self, modules: Sequence[str], errors: Callable[[int], Weights], key: Mapping[str, Any]
    ) -> dict[str, float]:
        bench, blocks = self._bench, self._bench.blocks
        stream = Stream(
            blocks,
            self._ids,
            self._mask,
            bench.states / "token losses",
            key,
            name="the model",
            batch_size=bench.batch_size,
        )
        check_room({stream.store: blocks.count + 3})
        if not stream.store.has(f"gradient-{blocks.count}"):
            self._to_the_head(stream)
        stream.forget(blocks.count)
        losses: dict[str, float] = {}
        for index in reversed(range(blocks.count)):
            bench.events.progress("differentiating", blocks.count - 1 - index, blocks.count, "the dense model")
            inside = [module for module in modules if layer_number(module) == index]
            losses |= self._block(stream, index, inside, errors)
        bench.events.progress("differentiating", blocks.count, blocks.count, "the dense model")
        stream.store.remove("gradient-0")
        return losses

    def _to_the_head(self, stream: Stream) -> None:
        """The inputs of all blocks, and the gradient at the head's input."""
        bench, blocks = self._bench, self._bench.blocks
        for index in range(stream.begin(), blocks.count):
            bench.events.progress("measuring", index, blocks.count, "the dense model")
            with blocks.block(index) as block:
                stream.step(block, index)
        generator = torch.Generator().manual_seed(0)
        draws = torch.rand(self._ids.shape, generator=generator, dtype=torch.float64)
        with blocks.head() as head, stream.store.writing(f"gradient-{blocks.count}") as write:
            stream.slopes(head, draws, write)

    def _block(
        self, stream: Stream, index: int, modules: Sequence[str], errors: Callable[[int], Weights]
    ) -> dict[str, float]:
        """The gradient at a block's output -> that at its input; gives the losses of its matrices' errors."""
        blocks, store = self._bench.blocks, stream.store
        sums = dict.fromkeys(modules, 0.0)
        given = errors(index)
        errors_here = {module: given[suffix(module)] for module in modules}
        with blocks.block(index) as block, store.writing(f"gradient-{index}") as write:
            for batch in stream.batches:
                above = store.read(f"gradient-{index + 1}", batch).to(blocks.device)
                counted = self._mask[batch].to(blocks.device)
                with _watched(blocks, block, errors_here, counted.numel()) as effects:
                    write(stream.differentiate(block, index, batch, above))
                for module, effect in effects.items():
                    sums[module] += float(effect.view(counted.shape)[counted].square().sum())
        if index + 1 < blocks.count:
            store.remove(f"gradient-{index + 1}")
        return {module: total / 2 / int(self._mask.sum()) for module, total in sums.items()}


@contextmanager
def _watched(
    blocks: ModelBlocks, block: nn.Module, errors: Mapping[str, Tensor], count: int
) -> Iterator[dict[str, Tensor]]:
    """Context in which a backward pass leaves g^T E x of every token, [count] float64, by module."""
    effects: dict[str, Tensor] = {}

    def hook(module: str, section: Section | None) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def forward(layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            x, error = args[0].detach(), errors[module]
            change = x.reshape(-1, x.shape[-1]) @ error.to(x).T
            tokens = routing.tokens(suffix(module))

            def backward(gradient: Tensor) -> None:
                own = gradient.detach().reshape(-1, gradient.shape[-1])
                own = own if section is None else section.of(own, 1)
                effect = (own * change).sum(dim=1, dtype=torch.float64)
                effects[module] = effect if tokens is None else effect.new_zeros(count).index_copy(0, tokens, effect)

            output.register_hook(backward)

        return forward

    handles = []
    try:
        with blocks.routing(block) as routing:
            for module in errors:
                path, section = blocks.place(suffix(module))
                handles.append(block.get_submodule(path).register_forward_hook(hook(module, section)))
            yield effects
    finally:
        for handle in handles:
            handle.remove()

"""What single directions of the matrices are worth at the really compressed model.

A global budget compares squared singular values, an estimate that holds near the dense model. At the compressed model
with its gradient G of the mean KL(dense || compressed), direction i of a matrix, A_i (``linalg/edges.py``), is worth
-<G, A_i> to first order: what KL falls by where it is added, and rises by where it is left out. Directions around the
edge of the truncation are summed up.

One pass forward keeps every block's input on disk, with the compressed matrices in place; the head gives the gradient
at the last hidden state, and the blocks are gone through from last to first. In memory are one block, the activations
of one batch in it, the gradients of its matrices, [out, in] each in the computing type, and the directions, which are
read once for all batches. Batches are equal parts of the text that are summed up apart; where they agree, the sums can
be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdconvert.factoring.decompositions import Decompositions, load_decomposition, load_metric
from svdconvert.factoring.sampled import Bench, Sampled
from svdconvert.factoring.samples import CORRECTED, PARTS, READ, correction_sample
from svdconvert.factoring.truncations import Truncations
from svdconvert.fields import NUMBER, few, record, table
from svdconvert.linalg.edges import direction_terms, directions, shared_directions
from svdconvert.models.stream import Stream
from svdconvert.names import layer_number, suffix
from svdconvert.planning.correction import Edge, edge_of
from svdconvert.planning.ranks import Target
from svdconvert.planning.steps import Step
from svdconvert.planning.targets import target_tensors
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import Source

_EDGES = {"edges": table(record({"measured": few(NUMBER, 2, CORRECTED), "predicted": NUMBER}))}


class Edges:
    """Edges of one model, text and set of decompositions."""

    def __init__(self, bench: Bench, store: Decompositions) -> None:
        """Prepare; nothing is computed before an edge is needed."""
        self._bench, self._store = bench, store

    def measure(self, targets: Sequence[Target], steps: Sequence[Step], number: int) -> dict[str, Edge]:
        """Module path -> what the directions around the edge of its truncation are worth.

        Args:
            targets: all targets, with their ranks; of those that stay dense, the last directions count.
            steps: of the plan with these ranks.
            number: of the round, from 0 on, which has sequences of its own.

        Raises:
            InputError: something is NaN or infinite, there are too few sequences, or the disk is too small.
            JobError: reading or writing failed; the same call goes on.
        """
        sample = correction_sample(self._bench.tokens, number)
        part = len(sample) // min(PARTS, len(sample))
        most = min(part, self._bench.batch_size)
        batch_size = next(size for size in range(most, 0, -1) if part % size == 0)  # so that batches are equal
        sampled = Sampled(self._bench, sample, batch_size, "correction", READ)
        places = {target.module: edge_of(target.rank, min(target.shape)) for target in targets}
        key = {**sampled.key(steps), "edges": places}
        found = self._bench.kept(
            key, _EDGES, lambda: self._measured(sampled, targets, steps, places, f"correction {number + 1}")
        )["edges"]
        return {
            target.module: Edge(tuple(found[target.module]["measured"]), found[target.module]["predicted"])
            for target in targets
        }

    def _measured(
        self,
        sampled: Sampled,
        targets: Sequence[Target],
        steps: Sequence[Step],
        places: Mapping[str, tuple[int, int]],
        name: str,
    ) -> dict[str, Any]:
        dense, blocks = sampled.dense, self._bench.blocks
        stream = sampled.compressed(targets, steps, name, keep=True)
        with blocks.head() as head, stream.store.writing(f"gradient-{blocks.count}") as write:
            tokens = stream.divergence(head, dense, write).tokens
        measured = {target.module: [0.0] * len(stream.batches) for target in targets}
        matrices = Truncations(self._bench.source, targets, steps, blocks.device)
        near = _Directions(self._bench.source, self._store, places)
        for index in reversed(range(blocks.count)):
            self._bench.events.progress("differentiating", blocks.count - 1 - index, blocks.count, name)
            layers = [
                (target, place)
                for target in targets
                for place, layer in enumerate(target.parts)
                if layer_number(layer.module) == index
            ]
            for part, target, value in self._block(stream, index, matrices, layers, near):
                measured[target.module][part] -= value / tokens
        self._bench.events.progress("differentiating", blocks.count, blocks.count, name)
        stream.store.clear()
        return {"edges": {t.module: {"measured": measured[t.module], "predicted": self._predicted(t)} for t in targets}}

    def _predicted(self, target: Target) -> float:
        start, stop = edge_of(target.rank, min(target.shape))
        return float(self._store.spectrum(target)[start:stop].sum())

    def _block(
        self,
        stream: Stream,
        index: int,
        matrices: Truncations,
        layers: Sequence[tuple[Target, int]],
        near: _Directions,
    ) -> list[tuple[int, Target, float]]:
        """The gradient at a block's output -> that at its input; gives ``(batch, target, sum of its terms)``."""
        blocks, found, store = self._bench.blocks, [], stream.store
        paths = {suffix(target.parts[place].module): (target, place) for target, place in layers}
        with blocks.block(index) as block:
            dense = {path: blocks.matrix(block, path).detach() for path in paths}
            pairs = {path: near(target, place, blocks.device) for path, (target, place) in paths.items()}
            with (
                blocks.replaced(block, matrices(index)),
                blocks.differentiable(block, list(paths)) as gradients,
                store.writing(f"gradient-{index}") as write,
            ):
                for number, batch in enumerate(stream.batches):
                    above = store.read(f"gradient-{index + 1}", batch).to(blocks.device)
                    write(stream.differentiate(block, index, batch, above))
                    for path, gradient in gradients().items():
                        terms = direction_terms(dense[path], gradient, *pairs[path])
                        found.append((number, paths[path][0], float(terms.sum())))
        stream.forget(index + 1)
        store.remove(f"gradient-{index + 1}")
        return found


@dataclass(frozen=True)
class _Directions:
    """The directions around the edges of targets."""

    source: Source
    store: Decompositions
    places: Mapping[str, tuple[int, int]]

    def __call__(self, target: Target, place: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Those of one layer of a target, for :func:`direction_terms`.

        Args:
            target: what it is, or is a part of.
            place: its place among the target's parts.
            device: where to.
        """
        start, stop = self.places[target.module]
        found, inner, _ = load_decomposition(self.store.path(target), device)
        if not target.followers:
            return directions(found, inner, start, stop)
        metrics = self.store.options(target)["metrics"]
        own = load_metric(Path(metrics[place]), device) if metrics else None
        rows = found.basis.double().flip(1)
        if not metrics and target.shape[0] < target.shape[1]:  # vectors on the side of the outputs
            rows = self._stack(target, device).T @ rows
        return shared_directions(rows, own, start, stop)

    def _stack(self, target: Target, device: torch.device) -> Tensor:
        """The matrices of a group, one above the other, float64."""
        tensors = target_tensors(self.source, [target])
        with WeightReader(self.source) as reader:
            infos = [tensors[part.weight] for part in target.parts]
            weights = [reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).to(device) for info in infos]
        return torch.cat([(weight.T if target.transposed else weight).double() for weight in weights])

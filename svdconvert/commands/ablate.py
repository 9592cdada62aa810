"""What the singular values are worth: zero one group of them at a time and see what the model loses.

The singular values of every target are sorted and cut into groups of equal number; one group is removed from all
matrices at once, and the perplexity measured. (Truncation removes the last groups together.)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from svdconvert import nats
from svdconvert.commands.evaluate import negative_log_likelihood
from svdconvert.errors import InputError
from svdconvert.factoring.decompose import decompose_targets
from svdconvert.factoring.decompositions import Decompositions, load_decomposition
from svdconvert.families.fused import section_of
from svdconvert.families.row import Architecture, Section
from svdconvert.families.table import dense_architecture
from svdconvert.machine.devices import resolve_device
from svdconvert.machine.interrupts import temporary_folder
from svdconvert.methods.table import METHODS
from svdconvert.models.loading import compute_dtype, load_model
from svdconvert.models.passages import read_passage
from svdconvert.models.preflight import check_model
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.events import Events
from svdconvert.planning.ranks import Target
from svdconvert.planning.targets import find_targets, target_tensors
from svdconvert.sentences import asked
from svdconvert.storage.gguf_source import source_of_view
from svdconvert.storage.opening import local_folder
from svdconvert.storage.reader import WeightReader
from svdconvert.storage.source import LocalSource, Source


@dataclass(frozen=True)
class GroupResult:
    """One row of the ablation.

    Attributes:
        group: its number, 1 for the largest singular values; 0 is the untouched model.
        first, last: where it lies among the singular values of a matrix, as fractions of their number.
        energy: share of the squared singular values of all targets.
        perplexity: of the model without it.
    """

    group: int
    first: float
    last: float
    energy: float
    perplexity: float

    def to_json(self) -> dict[str, Any]:
        """The row in JSON types."""
        return asdict(self)


def ablate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str],
    *,
    groups: int = 10,
    targets: Sequence[str] = (),
    split_fused: bool = False,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    revision: str | None = None,
    device: str = "auto",
    events: Events | None = None,
) -> list[GroupResult]:
    """Perplexity of a dense model without each group of singular values in turn.

    The whole model is loaded, since it is evaluated.

    Args:
        model: a local folder or GGUF file, or a model on the Hub, which is then downloaded into the Hugging Face cache.
        text: UTF-8 text file.
        groups: number of groups.
        targets: patterns that choose among the linear layers; empty means all of them.
        split_fused: whether queries, keys and values that are one matrix have singular values each.
        window, stride, batch_size, revision, device: see :func:`svdconvert.evaluate`.
        events: receiver of progress.

    Returns:
        The untouched model, then one row a group.

    Raises:
        InputError: the model or the text cannot be used, or there are more groups than singular values.
    """
    events = events or Events()
    folder = local_folder(path_or_text(model), revision)
    source = source_of_view(folder) or LocalSource(folder)
    row = dense_architecture(source.config, source.where)
    chosen = find_targets(source, targets, split_fused=split_fused)
    fewest = min(min(target.shape) for target in chosen)
    if not 1 <= groups <= fewest:
        raise InputError(f"{asked('groups', groups)} is not possible; the smallest matrix has {fewest} singular values")
    used = resolve_device(device)
    check_model(source)
    passage = read_passage(folder, source.config, user_path(text), window, stride)
    with temporary_folder() as temporary:
        store = Decompositions(temporary, {})
        decompose_targets(source, chosen, METHODS["svd"], {}, store, None, torch.device(used), events)
        loaded = load_model(folder, used, compute_dtype(source.config, used))
        ablation = _Ablation(source, row, chosen, store, loaded)

        def perplexity() -> float:
            counted = partial(events.progress, "tokens")
            return nats.perplexity(negative_log_likelihood(loaded, passage, batch_size, counted) / passage.tokens)

        results = [GroupResult(0, 0.0, 1.0, 1.0, perplexity())]
        for group in range(groups):
            energy = ablation.remove(group, groups)
            result = GroupResult(group + 1, group / groups, (group + 1) / groups, energy, perplexity())
            results.append(result)
            events.note(f"without group {group + 1} of {groups}: perplexity {result.perplexity:.2f}")
    return results


class _Ablation:
    """A loaded model whose matrices lose one group of singular values at a time."""

    def __init__(
        self,
        source: Source,
        row: Architecture,
        targets: Sequence[Target],
        store: Decompositions,
        model: torch.nn.Module,
    ) -> None:
        self._source, self._row, self._targets, self._store, self._model = source, row, targets, store, model
        self._tensors = target_tensors(source, targets)
        self._spectra = [store.spectrum(target) for target in targets]
        self._total = sum(float(spectrum.sum()) for spectrum in self._spectra)

    def remove(self, group: int, groups: int) -> float:
        """Take a group out of all matrices, and put the one before it back; returns its share of the energy."""
        energy = 0.0
        with WeightReader(self._source) as reader:
            for target, spectrum in zip(self._targets, self._spectra, strict=True):
                place = _place(spectrum.numel(), group, groups)
                energy += float(spectrum[place].sum())
                section = section_of(self._row, self._source.config, target.module)
                weight = self._model.get_parameter(f"{self._row.prefix}{target.parts[0].layer}.weight")
                remaining = self._without(target, place, reader, weight.device)
                _put(remaining, weight.T if target.transposed else weight, section)
        return energy / self._total if self._total else 0.0

    def _without(self, target: Target, place: slice, reader: WeightReader, device: torch.device) -> torch.Tensor:
        """The source's matrix [out, in] without some of its singular directions, float64."""
        info = self._tensors[target.weight]
        weight = reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8)).to(device).double()
        weight = weight.T if target.transposed else weight
        decomposition, _, _ = load_decomposition(self._store.path(target), device)
        directions = decomposition.basis.flip(1)[:, place].double()
        if target.shape[0] >= target.shape[1]:
            return weight - (weight @ directions) @ directions.T
        return weight - directions @ (directions.T @ weight)


def _place(count: int, group: int, groups: int) -> slice:
    """Where a group lies among so many singular values, the largest first."""
    return slice(count * group // groups, count * (group + 1) // groups)


@torch.no_grad()
def _put(remaining: torch.Tensor, matrix: torch.Tensor, section: Section | None) -> None:
    """Write a matrix [out, in], or a part of one to its place."""
    if section is None:
        matrix.copy_(remaining)
    else:
        section.put(remaining, matrix)

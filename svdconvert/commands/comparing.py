"""A factored model against the dense one that it was made from: `svdconvert verify --against`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from svdconvert.errors import InputError
from svdconvert.factoring.matrix_report import MatrixReport, RoundedReport
from svdconvert.families.fused import split_layers, split_tensors
from svdconvert.families.table import Architecture, dense_architecture
from svdconvert.jobs.record import RECORD, read_record
from svdconvert.layouts.table import layout_of, stored_names
from svdconvert.linalg.residual import relative_difference, relative_error
from svdconvert.models.blocks import ModelBlocks
from svdconvert.models.probe import PROBE
from svdconvert.names import layer_number, suffix
from svdconvert.sentences import asked
from svdconvert.storage.reader import WeightReader, same_values, torch_dtype
from svdconvert.storage.source import Source
from svdconvert.storage.tying import embedding_of, head_copies
from svdconvert.tensors import TensorInfo
from svdconvert.words import listing

# Two float64 evaluations of the same stored numbers agree far better; the record was computed in float32.
_ERROR_TOLERANCE = 1e-3
# What a piece gives in float32, by its factors and by their product; another setting or weight shows in more.
_OUTCOME_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def compare(factored: Source, dense: Source, row: Architecture, folder: Path) -> list[Check]:
    """Compare a factored model with the dense one that it came from: every tensor, and what comes out.

    Args:
        factored, dense: the models.
        row: their architecture.
        folder: of the factored one, for its record.

    Raises:
        InputError: the dense one is another model's source.
    """
    if dense_architecture(dense.config, dense.where) is not row:
        raise InputError(f"{dense.where} is a {dense.config.get('model_type')} model, not the source of {folder}")
    return [*compare_tensors(factored, dense, row, folder), _outcome(factored, dense, row)]


def compare_tensors(factored: Source, dense: Source, row: Architecture, folder: Path) -> list[Check]:
    """Every tensor of a factored model against the dense one's: copies bit by bit, the others by their errors.

    Args:
        factored, dense, row, folder: see :func:`compare`.

    Raises:
        InputError: a matrix has another shape in the dense one.
    """
    ranks, copies = factored.config["svd_ranks"], head_copies(row, dense)
    split = split_layers(row, ranks)
    full_names = row.full_names(dense.tensors, dense.config)
    layout, products, rounded = layout_of(factored.config), dict[str, float](), dict[str, float]()
    copied, different = 0, _unequal_heads(dense, row, copies)
    with WeightReader(factored) as ours, WeightReader(dense) as theirs:
        for name, info in split_tensors(dense.tensors, row, dense.config, split.__contains__).items():
            if row.is_dropped(name) or info in copies:
                continue
            full = full_names.get(name) or row.full_name(name)
            module = full.removeprefix(row.prefix).removesuffix(".weight")
            if module in ranks and name.endswith(".weight"):
                stored = [factored.tensors[key] for key in stored_names(factored.config, row.prefix, module)]
                if layout.outer_shape(stored) != row.matrix_shape(info.shape):
                    raise InputError(
                        f"{name} has another shape in {dense.where} than in {folder}; it is not its source"
                    )
                up, down = layout.factors([_whole(ours, part) for part in stored])
                weight = _whole(theirs, info)
                products[module] = relative_error(weight.T if row.transposed else weight, up, down)
                continue
            target = factored.tensors.get(_copied_name(full, row, factored))
            if target is not None and target.name in factored.packed and target.shape == info.shape:
                rounded[module] = relative_difference(_whole(theirs, info), _whole(ours, target))
                continue
            if target is None or target.shape != info.shape or not _same(ours, theirs, target, info):
                different.append(name)
            copied += 1
        beside = _beside(dense, ours, theirs, factored)
        copied, different = copied + len(beside), [*different, *filter(None, beside)]
    recorded, checks = _recorded_errors(folder), [_copies(copied, different)]
    if products or not rounded:
        checks.append(_as_recorded("factored matrices", "multiplied out", products, recorded))
    if rounded:
        checks.append(_as_recorded("rounded matrices", "rounded", rounded, recorded))
    return checks


def _beside(dense: Source, ours: WeightReader, theirs: WeightReader, factored: Source) -> list[str]:
    """For every tensor beside the language models of two that see: its name if it differs, else nothing."""
    whole, other = factored.whole, dense.whole
    if whole is None or other is None:
        return []
    there = {whole.beside_in_memory(name): info for name, info in whole.rest.items()}
    return [
        "" if (own := there.get(other.beside_in_memory(name))) is not None and _same(ours, theirs, own, info) else name
        for name, info in other.rest.items()
    ]


def _unequal_heads(dense: Source, row: Architecture, copies: Sequence[TensorInfo]) -> list[str]:
    """Names of the tensors that a tied model must have equal to its embedding, and has not."""
    embedding = embedding_of(row, dense)
    return [copy.name for copy in copies if embedding is None or not same_values(dense, embedding, copy)]


def _copies(count: int, different: list[str]) -> Check:
    detail = listing(different) if different else f"{count} equal to the source's"
    return Check("copied tensors", not different, detail)


def _as_recorded(name: str, how: str, errors: Mapping[str, float], recorded: Mapping[str, float]) -> Check:
    """Whether the relative errors are those of the record, both by module path."""
    off = [
        module
        for module, error in errors.items()
        if module in recorded and abs(error - recorded[module]) > _ERROR_TOLERANCE * max(recorded[module], 1e-3)
    ]
    if off:
        return Check(name, False, f"not as recorded: {listing(off)}")
    worst = max(errors.values(), default=0.0)
    mean = sum(errors.values()) / len(errors) if errors else 0.0
    known = sum(module in recorded for module in errors)
    as_recorded = "as recorded" if known == len(errors) else f"{known} of them as recorded, the others without a record"
    figures = f"{len(errors)} {how}; relative error mean {mean:.4f}, worst {worst:.4f}"
    return Check(name, True, f"{figures}, {as_recorded if known else 'with no record of what it should be'}")


def _outcome(factored: Source, dense: Source, row: Architecture) -> Check:
    """Run a few tokens through the dense model's class with the products in it, and through the factored model.

    All that is neither a product nor packed is the dense model's own there. Each block of both gets the same input, so
    that the error of rounding does not add up.
    """
    name, worst = "outcome", 0.0
    try:
        for where, difference in _differences(factored, dense, row):
            worst = max(worst, difference)
            if difference > _OUTCOME_TOLERANCE:
                wrong = f"{difference:.2g} off those of the source's class with the products in it"
                return Check(name, False, f"{where} are {wrong}")
    except InputError as error:
        return Check(name, False, error.sentence)
    return Check(name, True, f"that of the source's class with the products in it, within {worst:.1g}")


def _differences(factored: Source, dense: Source, row: Architecture) -> Iterator[tuple[str, float]]:
    """The relative difference of what each piece of both models gives, by what it is called."""
    ids = torch.arange(PROBE).remainder(int(dense.config["vocab_size"]))[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    types = {name: torch_dtype(info.dtype) for name, info in factored.tensors.items()}
    stored_as = {
        full: types[copied]
        for full in row.full_names(dense.tensors, dense.config).values()
        if (copied := _copied_name(full, row, factored)) in types
    }
    ours, theirs = ModelBlocks(factored), ModelBlocks(dense, stored_as=stored_as)
    if ours.count != theirs.count:
        raise InputError(f"the source has {theirs.count} blocks, not {ours.count}")
    ranks = factored.config["svd_ranks"]
    whole = _packed_whole(factored, row)

    def product(module: str) -> Tensor:
        if module in whole:
            return _whole(reader, factored.tensors[whole[module]])
        names = stored_names(factored.config, row.prefix, module)
        return layout_of(factored.config).product([_whole(reader, factored.tensors[name]) for name in names])

    with WeightReader(factored) as reader, torch.no_grad():
        hidden = ours.embed(ids, mask)
        yield "the embeddings", _difference(hidden, theirs.embed(ids, mask), hidden)
        for index in range(ours.count):
            own = [module for module in (*ranks, *whole) if layer_number(module) == index]
            products = {suffix(module): product(module) for module in own}
            with ours.block(index) as block, theirs.block(index) as other, theirs.replaced(other, products):
                found, expected = ours.run(block, hidden, mask), theirs.run(other, hidden, mask)
            yield f"the outputs of block {index}", _difference(found, expected, found - hidden)
            hidden = found
        for found, expected in zip(ours.logits(hidden), theirs.logits(hidden), strict=True):
            if found.shape != expected.shape:
                raise InputError("the source has another vocabulary")
            yield "the logits", _difference(found, expected, found)


def _packed_whole(factored: Source, row: Architecture) -> dict[str, str]:
    """Module path -> its weight, of packed matrices that are no factors."""
    config = factored.config
    factors = {name for module in config["svd_ranks"] for name in stored_names(config, row.prefix, module)}
    named = {name: row.full_name(name).removeprefix(row.prefix).removesuffix(".weight") for name in factored.packed}
    return {module: name for name, module in named.items() if name not in factors}


def _difference(found: Tensor, expected: Tensor, scale: Tensor) -> float:
    """||found - expected|| / ||scale||; infinite where it is no number."""
    off, size = (float(torch.linalg.vector_norm(t.double())) for t in (found - expected, scale))
    relative = off / size if size else math.inf if off else 0.0
    return math.inf if math.isnan(relative) else relative


def _copied_name(name: str, row: Architecture, factored: Source) -> str:
    module = name.removeprefix(row.prefix).removesuffix(".bias")
    if name.endswith(".bias") and module in factored.config["svd_ranks"]:
        return layout_of(factored.config).bias_name(name)
    return row.factored_name(name)


def _recorded_errors(folder: Path) -> dict[str, float]:
    """Module path -> relative error, of products and of rounded matrices; empty without a record."""
    if not (folder / RECORD).is_file():
        return {}
    results = read_record(folder).results
    matrices, rounded = results.get("matrices") or {}, results.get("rounded") or {}
    if not isinstance(matrices, dict):
        raise InputError(
            f"{folder / RECORD} is of a model without factors; convert again with {asked('overwrite', True)}"
        )
    products = {module: MatrixReport.from_json(matrix).relative_error for module, matrix in matrices.items()}
    return products | {module: RoundedReport.from_json(matrix).relative_error for module, matrix in rounded.items()}


def _whole(reader: WeightReader, info: TensorInfo) -> torch.Tensor:
    return reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))


def _same(ours: WeightReader, theirs: WeightReader, mine: TensorInfo, other: TensorInfo) -> bool:
    """Whether a copied tensor holds the source's values, in whatever type it was asked to be stored."""
    return torch.equal(_whole(ours, mine), _whole(theirs, other).to(torch_dtype(mine.dtype)))

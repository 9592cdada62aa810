"""Is the result what it says it is? Checks after a conversion, and `svdconvert verify` at any later time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from svdconvert.architectures import Architecture, dense_architecture, factored_architecture
from svdconvert.checkpoint import modeling_source
from svdconvert.densifying import outer_shape
from svdconvert.documents import read_bytes
from svdconvert.errors import InputError, JobError
from svdconvert.foreign import foreign_code
from svdconvert.headers import DTYPES, TensorInfo
from svdconvert.layouts import layout_of, stored_names
from svdconvert.loading import factored_classes, quiet_transformers, without_attention
from svdconvert.pivoting import full_up
from svdconvert.probing import PROBE, probe
from svdconvert.sharing import relative_error
from svdconvert.source import LocalSource, Source, listing, open_source
from svdconvert.splitting import split_layers, split_tensors
from svdconvert.weights import WeightReader
from svdconvert.writer import RECORD, read_record

# Two float64 evaluations of the same stored numbers agree far better; the record was computed in float32.
_ERROR_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    passed: bool
    detail: str


def self_check(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Look at a result before its config.json makes it a model.

    Returns:
        What was found, one sentence each.

    Raises:
        JobError: the files do not make the model that the config describes.
    """
    source = _Files(folder, config)
    checks = [_keys_and_shapes(source, config), _logits(folder, source)]
    for check in checks:
        if not check.passed:
            raise JobError(
                f"{folder} failed its check ({check.name}: {check.detail}); please report this with the command"
            )
    return [f"{check.name}: {check.detail}" for check in checks]


def verify(folder: Path, against: str | None = None, revision: str | None = None) -> list[Check]:
    """Check a factored checkpoint, on its own and against its dense source.

    Args:
        folder: the factored checkpoint.
        against: the dense model that it was made from; every factored matrix is multiplied out and compared with
            it, every other tensor is compared bit by bit.
        revision: of the dense model on the Hub.

    Returns:
        All checks, passed or not.

    Raises:
        InputError: the folder is no factored checkpoint, or the other model cannot be opened.
    """
    source = LocalSource(folder)
    row = factored_architecture(source.config, str(folder))
    checks = [_modeling_file(folder, row), _ranks(source, row)]
    checks.append(_keys_and_shapes(source, source.config))
    if all(check.passed for check in checks[1:]):
        checks.append(_logits(folder, source))
    if against is not None:
        checks += _compare(source, open_source(against, revision, download_folder=None), row, folder)
    return checks


class _Files(LocalSource):
    """The weights of a folder that has no config.json yet."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        super().__init__(folder)

    def read_config(self) -> dict[str, Any]:
        return self._config


def _modeling_file(folder: Path, row: Architecture) -> Check:
    path = folder / f"{row.modeling}.py"
    if not path.is_file():
        return Check("modeling file", False, f"{path.name} is missing, so trust_remote_code has nothing to load")
    same = read_bytes(path, "") == modeling_source(row)
    detail = "the one of this version" if same else "another one than this version's; it was not run here"
    return Check("modeling file", same, detail)


def _ranks(source: Source, row: Architecture) -> Check:
    ranks = source.config["svd_ranks"]
    for module, rank in ranks.items():
        down, up, *position = stored_names(source.config, row.prefix, module)
        if position and position[0] not in source.tensors:
            return Check("ranks", False, f"{position[0]} is missing, so the order of the outputs is unknown")
        for name, axis in ((down, 0), (up, 1)):
            info = source.tensors.get(name)
            if info is None or info.shape[axis] != rank:
                found = "missing" if info is None else f"of rank {info.shape[axis]}"
                return Check("ranks", False, f"config.json says rank {rank} for {module}, but {name} is {found}")
    return Check("ranks", True, f"{len(ranks)} matrices as config.json says")


def _keys_and_shapes(source: Source, config: Mapping[str, Any]) -> Check:
    """Build the model without memory and compare what it expects with what the files hold."""
    name = "keys and shapes"
    try:
        expected = expected_tensors(config)
    except InputError as error:
        return Check(name, False, str(error))
    found = {key: info.shape for key, info in source.tensors.items()}
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [key for key in expected if key in found and found[key] != expected[key]]
    problems = [
        f"{what} {listing(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    return Check(name, not problems, "; ".join(problems) or f"{len(expected)} tensors, none missing or unexpected")


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a config describes, dense or factored, under their names on the disk.

    Raises:
        InputError: no model can be made of it.
    """
    if "svd_ranks" not in config:
        return dense_architecture(config, "the result").parameters(config)
    config_class, model_class = factored_classes(factored_architecture(config, "the result"))
    with foreign_code("config.json cannot be used"), torch.device("meta"), quiet_transformers():
        model = model_class(config_class(**without_attention(config)))
    tied = set(getattr(model, "_tied_weights_keys", None) or []) if config.get("tie_word_embeddings") else set()
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}


def _logits(folder: Path, source: Source) -> Check:
    try:
        how = probe(folder, source)
    except InputError as error:
        return Check("logits", False, str(error))
    return Check("logits", True, f"finite for {PROBE} tokens, {how}")


def _compare(factored: Source, dense: Source, row: Architecture, folder: Path) -> list[Check]:
    """Compare every tensor with the dense model it came from."""
    if dense_architecture(dense.config, dense.name) is not row:
        raise InputError(f"{dense.name} is a {dense.config.get('model_type')} model, not the source of {folder}")
    recorded = _recorded_errors(folder)
    ours, theirs = WeightReader(factored), WeightReader(dense)
    copied, different, errors, off = 0, [], [], []
    split = split_layers(row, factored.config["svd_ranks"])
    for name, info in split_tensors(dense.tensors, row, dense.config, split.__contains__).items():
        full = row.full_name(name)
        module = full.removeprefix(row.prefix).removesuffix(".weight")
        if row.is_dropped(name) or (name == row.head[0] and row.is_tied(dense.config)):
            continue
        if module in factored.config["svd_ranks"] and name.endswith(".weight"):
            stored = [factored.tensors[key] for key in stored_names(factored.config, row.prefix, module)]
            if outer_shape(stored) != row.matrix_shape(info.shape):
                raise InputError(f"{name} has another shape in {dense.name} than in {folder}; it is not its source")
            down, up, *position = (_whole(ours, part) for part in stored)
            if position:
                up = full_up(up, position[0])
            weight = _whole(theirs, info)
            error = relative_error(weight.T if row.transposed else weight, up, down)
            errors.append(error)
            if module in recorded and abs(error - recorded[module]) > _ERROR_TOLERANCE * max(recorded[module], 1e-3):
                off.append(module)
            continue
        target = factored.tensors.get(_copied_name(full, row, factored))
        if target is None or target.shape != info.shape or not _same(ours, theirs, target, info):
            different.append(name)
        copied += 1
    worst = max(errors, default=0.0)
    mean = sum(errors) / len(errors) if errors else 0.0
    return [
        Check("copied tensors", not different, listing(different) if different else f"{copied} equal to the source's"),
        Check(
            "factored matrices",
            not off,
            f"not as recorded: {listing(off)}"
            if off
            else f"{len(errors)} multiplied out; relative error mean {mean:.4f}, worst {worst:.4f}, as recorded",
        ),
    ]


def _copied_name(name: str, row: Architecture, factored: Source) -> str:
    module = name.removeprefix(row.prefix).removesuffix(".bias")
    if name.endswith(".bias") and module in factored.config["svd_ranks"]:
        return layout_of(factored.config).bias_name(name)
    return row.factored_name(name)


def _recorded_errors(folder: Path) -> dict[str, float]:
    if not (folder / RECORD).is_file():
        return {}
    matrices = read_record(folder).get("matrices") or {}
    if not isinstance(matrices, dict):
        raise InputError(f"{folder / RECORD} is that of a model without factors; convert anew, with --overwrite")
    return {module: matrix["relative_error"] for module, matrix in matrices.items()}


def _whole(reader: WeightReader, info: TensorInfo) -> torch.Tensor:
    return reader.read(info, torch.empty(info.nbytes, dtype=torch.uint8))


def _same(ours: WeightReader, theirs: WeightReader, mine: TensorInfo, other: TensorInfo) -> bool:
    """Whether a copied tensor holds the source's values, in whatever type it was asked to be stored."""
    dtype = getattr(torch, DTYPES[mine.dtype][1])
    return torch.equal(_whole(ours, mine), _whole(theirs, other).to(dtype))


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if not check.passed]

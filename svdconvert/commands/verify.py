"""Is the result what it says it is? Checks after a conversion, and `svdconvert verify` at any later time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from svdconvert.commands.comparing import Check, compare
from svdconvert.errors import InputError, JobError
from svdconvert.families.table import Architecture, dense_architecture, factored_architecture
from svdconvert.families.tower import Tower
from svdconvert.foreign import CORRECT, foreign_code, quiet_transformers
from svdconvert.jobs.model_files import modeling_source
from svdconvert.jobs.record import RECORD, SEAL, is_changed, read_record
from svdconvert.jobs.shard_writer import new_digest
from svdconvert.layouts.table import layout_of, stored_names
from svdconvert.models.index_tensors import unsound
from svdconvert.models.loading import factored_classes, portable
from svdconvert.models.preflight import check_beside
from svdconvert.models.probe import PROBE, probe
from svdconvert.paths import path_or_text, user_path
from svdconvert.storage.documents import read_bytes, read_json
from svdconvert.storage.opening import open_source
from svdconvert.storage.reader import WeightReader, as_bytes
from svdconvert.storage.source import LocalSource, Source
from svdconvert.words import listing, numbered


def self_check(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Look at a result before its config.json makes it a model.

    Returns:
        What was found, one sentence each.

    Raises:
        JobError: the files do not make the model that the config describes.
    """
    source = LocalSource(folder, config=config)
    checks = [_keys_and_shapes(source, source.config), _logits(folder, source)]
    for check in checks:
        if not check.passed:
            raise JobError(
                f"{folder} failed its check ({check.name}: {check.detail}); please report this with the command"
            )
    return [f"{check.name}: {check.detail}" for check in checks]


def verify(
    folder: str | os.PathLike[str], against: str | os.PathLike[str] | None = None, revision: str | None = None
) -> list[Check]:
    """Check a factored checkpoint, on its own and against its dense source.

    Args:
        folder: the factored checkpoint.
        against: the dense model that it was made from; the errors of factored and of rounded matrices must be
            those of the record, every other tensor is compared bit by bit, and a few tokens are run through both.
        revision: of the dense model on the Hub.

    Returns:
        All checks, passed or not.

    Raises:
        InputError: the folder is no factored checkpoint, or the other model cannot be opened.
    """
    folder = user_path(folder)
    source = LocalSource(folder)
    row = factored_architecture(source.config, str(folder))
    ranks, shapes = _ranks(source, row), _keys_and_shapes(source, source.config)
    owner = row if source.whole is None else source.whole.tower
    checks = [
        _modeling_file(folder, owner),
        ranks,
        shapes,
        *_packed(source),
        *_as_written(folder),
    ]
    if ranks.passed and shapes.passed:
        positions = _positions(source, row)
        checks += positions
        if failed(positions):
            return checks  # nothing can be computed
        checks.append(_logits(folder, source))
    if against is not None and ranks.passed:  # else factors are missing that would be compared
        checks += compare(source, open_source(path_or_text(against), revision, download_folder=None), row, folder)
    return checks


def _modeling_file(folder: Path, row: Architecture | Tower) -> Check:
    path = folder / f"{row.modeling}.py"
    if not path.is_file():
        return Check("modeling file", False, f"{path.name} is missing, so trust_remote_code has nothing to load")
    same = read_bytes(path, "") == modeling_source(row)
    detail = "the one of this version" if same else "not the one of this version; it was not run"
    return Check("modeling file", same, detail)


def _packed(source: Source) -> list[Check]:
    """Whether packed weights are numbers; nothing where there are none.

    That integers, scales and shapes fit each other and config.json was seen when they were opened.
    """
    counts = Counter(str(packed.grid) for packed in source.packed.values())
    with WeightReader(source) as reader:
        for name, packed in source.packed.items():
            scales = reader.read(packed.scale, torch.empty(packed.scale.nbytes, dtype=torch.uint8))
            if not bool(torch.isfinite(scales).all()):
                return [Check("packed weights", False, f"{name} has scales that are NaN or infinite")]
    told = ", ".join(f"{count} at {grid}" for grid, count in sorted(counts.items()))
    return [Check("packed weights", True, told)] if told else []


def _as_written(folder: Path) -> list[Check]:
    """Whether record and tensors are what svdconvert wrote: errors alone do not tell, being least at the factors.

    Nothing for a result that has no record of it, of an early version or saved by another program.
    """
    if not (folder / RECORD).is_file():
        return []
    document = read_json(folder / RECORD, "")
    checks = [_record(document)] if SEAL in document else []
    told = read_record(folder).tensors
    if told is None:
        return checks
    changed, source = [], LocalSource(folder, as_stored=True)
    every = dict(source.tensors) if source.whole is None else source.whole.in_files(source.tensors)
    with WeightReader(source) as reader:
        for name, info in every.items():
            digest = new_digest()
            for piece in reader.stream(info):
                digest.update(as_bytes(piece))
            if told.get(name) != digest.hexdigest():
                changed.append(name)
    detail = f"{len(every)} tensors as svdconvert wrote them"
    return [*checks, Check("data", not changed, f"changed since: {listing(changed)}" if changed else detail)]


def _record(document: Mapping[str, Any]) -> Check:
    """Whether what the record says of the result was changed."""
    changed = is_changed(document)
    return Check("record", not changed, f"{RECORD} {'was changed since' if changed else 'as svdconvert wrote it'}")


def _ranks(source: Source, row: Architecture) -> Check:
    ranks, axes = source.config["svd_ranks"], layout_of(source.config).rank_axes
    for module, rank in ranks.items():
        names = stored_names(source.config, row.prefix, module)
        said = f"config.json says rank {rank} for {module}"
        missing = next((name for name in names if name not in source.tensors), None)
        if missing is not None:
            return Check("ranks", False, f"{said}, but {missing} is missing")
        for place, axis in axes:
            found = source.tensors[names[place]].shape[axis]
            if found != rank:
                return Check("ranks", False, f"{said}, but {names[place]} is of rank {found}")
    return Check("ranks", True, f"{numbered(len(ranks), 'matrix', 'matrices')} as config.json says")


def _positions(source: Source, row: Architecture) -> list[Check]:
    """Whether the index tensors are sound; nothing for a layout without any."""
    layout = layout_of(source.config)
    if not layout.indices((2, 2)):
        return []
    name = unsound(source, row)
    detail = f"each a {layout.index_rule}" if name is None else f"{name} is not a {layout.index_rule}; it was changed"
    return [Check("positions", name is None, detail)]


def _keys_and_shapes(source: Source, config: Mapping[str, Any]) -> Check:
    """Build the model without memory and compare what it expects with what the files hold."""
    name = "keys and shapes"
    try:
        expected = expected_tensors(config)
    except InputError as error:
        return Check(name, False, error.sentence)
    if source.whole is not None:
        try:
            check_beside(source.whole)
        except InputError as error:
            return Check(name, False, error.sentence)
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
    with foreign_code("config.json cannot be used", CORRECT), torch.device("meta"), quiet_transformers():
        model = model_class(config_class(**portable(config)))
    tied = set(getattr(model, "_tied_weights_keys", None) or []) if config.get("tie_word_embeddings") else set()
    return {key: tuple(value.shape) for key, value in model.state_dict().items() if key not in tied}


def _logits(folder: Path, source: Source) -> Check:
    try:
        how = probe(folder, source)
    except InputError as error:
        return Check("logits", False, error.sentence)
    return Check("logits", True, f"finite for {PROBE} tokens, {how}")


def failed(checks: Sequence[Check]) -> list[Check]:
    """Those that did not pass."""
    return [check for check in checks if not check.passed]

"""The statistics of data-aware methods, collected once for many conversions."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.calibration.knowledge import Calibration, needs_of, run_statistics, self_text, write_tokens
from svdconvert.errors import InputError
from svdconvert.families.table import dense_architecture
from svdconvert.machine import processes
from svdconvert.machine.devices import resolve_device
from svdconvert.methods.table import method_named
from svdconvert.paths import path_or_text, user_path
from svdconvert.planning.events import Events
from svdconvert.planning.targets import choose_targets
from svdconvert.sentences import asked
from svdconvert.settings.text import Text, refused
from svdconvert.storage import locks
from svdconvert.storage.folders import refuse_foreign_files
from svdconvert.storage.opening import open_source
from svdconvert.storage.source import Source

if TYPE_CHECKING:
    from svdconvert.calibration.text import CalibrationTokens


def calibrate(
    model: str | os.PathLike[str],
    calibration: Calibration,
    out: str | os.PathLike[str],
    *,
    methods: Sequence[str] = ("kfac",),
    revision: str | None = None,
    device: str = "auto",
    events: Events | None = None,
) -> float | None:
    """Collect statistics once, for any number of conversions of the same model.

    An interrupted call goes on with the blocks that are missing when it is made again.

    Args:
        model, revision, device, events: see :func:`svdconvert.convert`.
        calibration: the text.
        out: folder to write.
        methods: what the statistics are to be good for.

    Returns:
        The model's perplexity on the text.

    Raises:
        InputError: the model, the text or the folder cannot be used.
        JobError: it broke off; the same call continues it.
    """
    from svdconvert.calibration.folder import StatisticsFolder, save_statistics, statistics_key
    from svdconvert.models.preflight import check_model

    if not isinstance(calibration, Text):
        raise refused(calibration)
    events = events or Events()
    folder = user_path(out)
    rows = [method_named(name) for name in methods]
    kinds = sorted({kind for row in rows for kind in row.statistics})
    if not kinds:
        raise InputError(f"{asked('methods', [row.name for row in rows])} uses no text; choose another")
    used, group = resolve_device(device), processes.current()
    if group.leader:
        leftovers = {locks.STATISTICS_LOCK, f"{locks.STATISTICS_LOCK}.pid", ".stats.json.tmp", "source"}
        refuse_foreign_files(folder, known=(folder / "stats.json").is_file(), leftovers=leftovers)
    source = open_source(path_or_text(model), revision, download_folder=group.own(folder / "source"))
    architecture = dense_architecture(source.config, source.where)
    modules = [target.module for target in choose_targets(source.tensors, architecture, ())]
    check_model(source)
    read = None if calibration.by_model else calibration.tokens(source)
    for note in (*source.notes, *(read.notes if read else ())):
        events.note(note)
    work = folder / "work"
    with locks.writing(folder, locks.STATISTICS_LOCK, f"give another {asked('out')}"):
        tokens = read or _written(source, calibration, folder, work, used, events)
        key = statistics_key(source, tokens, needs_of(kinds), labels=calibration.labels, seed=calibration.seed)
        with group.leader_first():
            store = StatisticsFolder(folder, key, create=True)
        run = run_statistics(source, tokens, calibration, kinds, modules, used, work, events, group.share(store.blocks))
        if group.leader:
            store.save_tokens(tokens)
        save_statistics(store, run)
        group.wait()
        for left in (group.own(folder / "source"), work):
            shutil.rmtree(left, ignore_errors=True)
        loss = group.share(store.loss)
    return loss.perplexity if loss else None


def _written(
    source: Source, calibration: Text, folder: Path, work: Path, device: str, events: Events
) -> CalibrationTokens:
    """The text that the model writes; that of a folder of statistics which were collected from it is read there."""
    from svdconvert.calibration.folder import TOKENS, StatisticsFolder

    text, group, kept = self_text(source, calibration), processes.current(), None
    if group.leader and (folder / "stats.json").is_file():
        found = StatisticsFolder(folder)
        kept = found.tokens() if found.key["text"] == text.digest and (folder / TOKENS).is_file() else None
    return group.share(kept) or write_tokens(text, work, device, events)

"""Writing a checkpoint so that it can be killed at any moment.

While a job runs, everything lives in ``DIR/.svdconvert/``: the settings it runs under, a journal of finished steps
(``jobs/journal.py``), and each weight file under a partial name (``jobs/shard_writer.py``). A weight file gets its
final name when it is complete and on the disk; ``config.json`` comes last of all, so that a folder with it is a whole
model and one without it is none.

Several processes (``machine/processes.py``) write into the same weight files, each at the places of its own steps and
with a journal of its own; the leader gives the files their names when all are through. A lost process loses what it had
not recorded, as a single one would.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.fields import COUNT, NUMBER, OBJECT, TEXT, either, many, optional, record, require, table
from svdconvert.jobs.journal import journals
from svdconvert.machine.processes import Group
from svdconvert.sentences import asked
from svdconvert.storage.differences import difference
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import json_or_none, read_json
from svdconvert.storage.locks import FolderLock
from svdconvert.storage.other_formats import ADAPTER_CONFIG
from svdconvert.storage.source import PICKLE_INDEX, SAFE_INDEX
from svdconvert.words import listing

JOB_FOLDER = ".svdconvert"
# Folders in it whose content is worth going on with: downloads, statistics, decompositions.
WORK_FOLDERS = ("source", "work")
RECORD = "svdconvert.json"
# What every result has, beside weights and what the source has.
FILES = ("config.json", RECORD, "README.md")

# What would be taken for a part of a model that it lies beside.
_WEIGHTS = (".safetensors", ".bin")
_MODEL_FILES = frozenset({SAFE_INDEX, PICKLE_INDEX, "generation_config.json", ADAPTER_CONFIG})

# What to do about a damaged file of ours.
_ANEW = f"convert again with {asked('overwrite', True)}"
_ELSEWHERE = "give another folder, or empty this one"
_JOB_FIELDS = {"settings": OBJECT}
_MATRIX = {"rank": COUNT, "shape": many(COUNT), "relative_error": NUMBER}
_RECORD_FIELDS = {
    "command": TEXT,
    "source": record({"name": TEXT}),
    "settings": OBJECT,
    "params": either(COUNT, record({"before": COUNT, "after": COUNT})),
    "matrices": optional(either(COUNT, table(record(_MATRIX)))),  # a densified model's were multiplied out
    "tensors": optional(table(TEXT)),  # since 0.2.0
    "predicted_loss": optional(NUMBER),
    "dense_loss": optional(NUMBER),
    "measured_loss": optional(NUMBER),
    "timing": many(table(record({"wall_seconds": NUMBER, "cpu_seconds": NUMBER}))),
}


def refuse_foreign(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with somebody else's files, before anything is read or downloaded for it.

    Raises:
        InputError: it is a file, or holds files and neither a job nor a result of ours, or, where it is to be
            overwritten, files that are not ours and in the way.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder as {asked('out')}")
    if not folder.is_dir():
        return
    if overwrite:
        refuse_in_the_way(folder, FILES, _ours(folder))
    elif not (folder / JOB_FOLDER).is_dir() and not (folder / RECORD).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder} holds files that svdconvert did not write; give another folder")


def refuse_in_the_way(folder: Path, names: Iterable[str], ours: Collection[str]) -> None:
    """Refuse to write over files that svdconvert has not written, or beside what would be taken for a part of a model.

    Args:
        folder: where the model goes.
        names: files that it will have.
        ours: files that we may replace.

    Raises:
        InputError: there are such files; they are named and stay.
    """
    wanted = set(names)
    there = [
        entry.name
        for entry in folder.iterdir()
        if entry.name in wanted or entry.name in _MODEL_FILES or entry.name.endswith(_WEIGHTS)
    ]
    there += [name for name in sorted(wanted) if "/" in name and (folder / name).exists()]
    foreign = sorted(set(there) - set(ours))
    if foreign:
        raise InputError(
            f"{folder} holds {listing(foreign)}, which svdconvert did not write and which would be replaced or taken "
            "for a part of the model; move it away, or give another folder"
        )


def _ours(folder: Path) -> set[str]:
    """Files that a result's record and a job say they have written or will."""
    ours: set[str] = set()
    for path in (folder / RECORD, folder / JOB_FOLDER / "job.json"):
        found = json_or_none(path)
        files = found.get("files") if found is not None else None
        if isinstance(files, list):
            ours.update(name for name in files if isinstance(name, str) and _is_inside(folder, name))
    if (folder / RECORD).is_file() or (folder / JOB_FOLDER / "job.json").is_file():
        ours.update(FILES)
    return ours


def _is_inside(folder: Path, name: str) -> bool:
    """Whether a name is that of a file in a folder, and no way out of it."""
    parts = Path(name).parts
    if not parts or Path(name).is_absolute() or ".." in parts or "\0" in name or parts[0] == JOB_FOLDER:
        return False
    return not any(folder.joinpath(*parts[:count]).is_symlink() for count in range(1, len(parts)))


def read_record(folder: Path) -> dict[str, Any]:
    """A finished result's ``svdconvert.json``.

    Raises:
        InputError: there is none, or it lacks what a record has.
    """
    found = read_json(folder / RECORD, f"{folder} has no {RECORD}, so svdconvert did not write it", _ANEW)
    require(found, _RECORD_FIELDS, folder / RECORD, _ANEW)
    return found


class OutputFolder:
    """The folder that a job writes: who owns it, what of the job is done, and its files.

    Use as a context manager: it holds a lock, so that two jobs never write into one folder. Of several processes the
    leader enters first, and all of them share its lock.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], *, overwrite: bool = False, group: Group | None = None
    ) -> None:
        """Look at the folder; nothing is written yet.

        Args:
            folder: where the checkpoint goes; created when the job starts.
            settings: everything the result depends on, in JSON types.
            overwrite: give up the job or result of ours that is in the folder already.
            group: the processes that write it.

        Raises:
            InputError: the folder holds something else, or a job or result of other settings.
        """
        self.group = group or Group()
        overwrite = overwrite and self.group.leader
        self.folder = folder
        self.job = folder / JOB_FOLDER
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.overwrite = overwrite
        self.finished = False
        self._files: list[str] = []
        self._lock = FolderLock(folder, self.job / "lock", f"give another folder as {asked('out')}")
        refuse_foreign(folder, overwrite=overwrite)
        if overwrite or not folder.is_dir():
            return
        self._look()

    def _look(self) -> None:
        """Find out what is in the folder, and whether it is of these settings."""
        job = self.job / "job.json"
        self._files = sorted(_ours(self.folder))
        if job.exists():
            begun = read_json(job, "", _ELSEWHERE)
            require(begun, _JOB_FIELDS, job, _ELSEWHERE)
            self._refuse_other(begun["settings"], f"{self.folder} holds an unfinished job", "finish it as it was begun")
        elif (self.folder / RECORD).is_file() and (self.folder / "config.json").is_file():
            done = read_record(self.folder)
            self._refuse_other(done["settings"], f"{self.folder} holds a converted model", "give another folder")
            self.finished = True

    def _refuse_other(self, theirs: Mapping[str, Any], what: str, advice: str) -> None:
        found = difference(theirs, self.settings)
        if found is not None:
            field, values = found
            raise InputError(
                f"{what} with another {field.replace('_', ' ')} ({values}); {advice}, or add "
                f"{asked('overwrite', True)} to start again"
            )

    def __enter__(self) -> OutputFolder:
        """Take the folder and write down what the job is.

        Raises:
            InputError: it cannot be written, or another process is at it.
            JobError: the disk fails.
        """
        self._lock.acquire(shared=not self.group.leader, member=not self.group.leader)
        if not self.group.leader:
            return self
        try:
            with disk_errors(self.folder):
                if self.overwrite:
                    self._clear()
                elif not (self.job / "job.json").exists():
                    # Without it, whatever else is there cannot be known to be of this job.
                    clear_folder(self.job)
                self._write_job()
        except BaseException:
            self.__exit__()
            raise
        if self.group.size > 1:
            self._lock.share()
        return self

    def _write_job(self) -> None:
        told = {"settings": self.settings, "files": self._files}
        atomic_write(self.job / "job.json", json.dumps(told, indent=1).encode())

    def promise(self, names: Iterable[str]) -> None:
        """Say which files the result will have, before the first of them is written.

        Raises:
            InputError: there are files of that name that are not ours.
        """
        promised = set(names)
        refuse_in_the_way(self.folder, promised, self._files)
        with disk_errors(self.folder):
            for name in set(self._files) - promised:  # of a result that was half removed
                self._remove(name)
            self._files = sorted(promised)
            self._write_job()

    def __exit__(self, *exception: object) -> None:
        """Let go of the folder."""
        # A job that failed before anything was done must not bind the next command to its settings.
        over = self.group.leader and (self.finished or not self._worth_keeping())
        if over:
            self._clean_up()
        self._lock.release(remove=over)
        if over:
            for folder in (self.job, self.folder):
                with contextlib.suppress(OSError):
                    folder.rmdir()  # only if it is empty, as it was before

    def _worth_keeping(self) -> bool:
        """Whether there is anything that a continuation need not do again."""
        with contextlib.suppress(OSError):
            if not any(journal.stat().st_size for journal in journals(self.job)) and not any(
                folder.is_dir() and any(folder.iterdir())
                for name in WORK_FOLDERS
                for folder in self.job.glob(f"{name}*")
            ):
                return False
        return True

    def tidy(self) -> None:
        """Remove what a kill at its very end has left beside a finished result.

        Raises:
            InputError: another process is at it.
        """
        if self.job.is_dir():
            self._lock.acquire()
            self.__exit__()

    def _clean_up(self) -> None:
        """Remove what only an unfinished job needs; the lock goes with its holder."""
        # job.json first: without it, whatever a kill leaves of the rest is no job any more.
        with contextlib.suppress(OSError):
            (self.job / "job.json").unlink(missing_ok=True)
            clear_folder(self.job)

    def _clear(self) -> None:
        """Remove the result and the job that are here, by their own account."""
        ours = _ours(self.folder)
        # config.json first: from here on the folder is no model. The record goes last, which says what else is ours.
        for name in ["config.json", *sorted(ours - {"config.json", RECORD})]:
            if name in ours and not (self.folder / name).is_dir():
                self._remove(name)
        clear_folder(self.job)
        if RECORD in ours:
            self._remove(RECORD)

    def _remove(self, name: str) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)
        for parent in path.relative_to(self.folder).parents[:-1]:
            with contextlib.suppress(OSError):
                (self.folder / parent).rmdir()  # if nothing else is in it

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file of the checkpoint, whole or not at all."""
        path = self.folder / name
        with disk_errors(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, data)


def clear_folder(job: Path, *, ignore_errors: bool = False) -> None:
    """Remove all that is in a job's folder but its lock."""
    for entry in job.iterdir() if job.is_dir() else ():
        with contextlib.suppress(*([OSError] if ignore_errors else [])):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif not entry.name.startswith("lock"):
                entry.unlink()

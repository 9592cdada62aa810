"""Writing a checkpoint so that it can be killed at any moment.

While a job runs, everything lives in ``DIR/.svdconvert/``: the settings it runs under, a journal of finished steps,
and each weight file under a partial name. A weight file gets its final name when it is complete and on the disk;
``config.json`` comes last of all, so that a folder with it is a whole model and one without it is none.

Several processes (``processes.py``) write into the same weight files, each at the places of its own steps and with a
journal of its own; the leader gives the files their names when all are through. A lost process loses what it had not
recorded, as a single one would.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.documents import read_json, read_json_lines
from svdconvert.errors import InputError, JobError
from svdconvert.fields import COUNT, NUMBER, OBJECT, TEXT, either, many, optional, problem, record, require, table
from svdconvert.headers import TensorInfo, layout
from svdconvert.processes import Group
from svdconvert.source import PICKLE_INDEX, SAFE_INDEX, listing

# What may be lost to a kill: data are made durable and recorded in batches, since every batch costs several fsyncs.
BATCH_BYTES = 32_000_000
BATCH_SECONDS = 5.0

JOB_FOLDER = ".svdconvert"
# Folders in it whose content is worth going on with: downloads, statistics, decompositions.
WORK_FOLDERS = ("source", "work")
RECORD = "svdconvert.json"
JOURNAL = "journal.jsonl"

# What to do about a damaged file of ours.
_ANEW = "convert anew, with --overwrite"
_JOB_FIELDS = {"settings": OBJECT}
_JOURNAL_FIELDS = {"step": TEXT, "tensors": many(TEXT), "report": OBJECT}
_MATRIX = {"rank": COUNT, "shape": many(COUNT), "relative_error": NUMBER}
_RECORD_FIELDS = {
    "command": TEXT,
    "source": record({"name": TEXT}),
    "settings": OBJECT,
    "params": either(COUNT, record({"before": COUNT, "after": COUNT})),
    "matrices": optional(either(COUNT, table(record(_MATRIX)))),  # a densified model's were multiplied out
    "predicted_loss": optional(NUMBER),
    "dense_loss": optional(NUMBER),
    "measured_loss": optional(NUMBER),
    "timing": many(table(record({"wall_seconds": NUMBER, "cpu_seconds": NUMBER}))),
}


def refuse_foreign(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder with somebody else's files, before anything is read or downloaded for it.

    Raises:
        InputError: it is a file, or holds files and neither a job nor a result of ours.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder with --out")
    if overwrite or not folder.is_dir() or (folder / JOB_FOLDER).is_dir() or (folder / RECORD).is_file():
        return
    if any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and not ours; give another folder, or --overwrite to replace it")


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
            overwrite: give up what is in the folder already.
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
        self._lock: int | None = None
        refuse_foreign(folder, overwrite=overwrite)
        if overwrite or not folder.is_dir():
            return
        job = self.job / "job.json"
        if job.is_file():
            begun = read_json(job, "", _ANEW)
            require(begun, _JOB_FIELDS, job, _ANEW)
            self._refuse_other(begun["settings"], f"{folder} holds an unfinished job", "finish it as it was begun")
        elif (folder / RECORD).is_file() and (folder / "config.json").is_file():
            done = read_record(folder)
            self._refuse_other(done["settings"], f"{folder} holds a converted model", "give another folder")
            self.finished = True

    def _refuse_other(self, theirs: Mapping[str, Any], what: str, advice: str) -> None:
        for field in dict.fromkeys([*self.settings, *theirs]):
            if self.settings.get(field) != theirs.get(field):
                raise InputError(
                    f"{what} with another {field.replace('_', ' ')} ({_short(theirs.get(field))}, now "
                    f"{_short(self.settings.get(field))}); {advice}, or add --overwrite to start anew"
                )

    def __enter__(self) -> OutputFolder:
        """Take the folder and write down what the job is.

        Raises:
            InputError: it cannot be written, or another process is at it.
        """
        try:
            self.job.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.job / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written ({error.strerror}); give another --out") from None
        self._flock(fcntl.LOCK_EX if self.group.leader else fcntl.LOCK_SH)
        if not self.group.leader:
            return self
        if self.overwrite:
            self._clear()
        with disk_errors(self.folder):
            atomic_write(self.job / "job.json", json.dumps({"settings": self.settings}, indent=1).encode())
        if self.group.size > 1:
            self._flock(fcntl.LOCK_SH)
        return self

    def _flock(self, kind: int) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, kind | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise InputError(f"{self.folder} is being written by another svdconvert; wait for it to end") from None

    def __exit__(self, *exception: object) -> None:
        """Let go of the folder."""
        assert self._lock is not None
        if not self.group.leader:
            os.close(self._lock)
            return
        if self.finished or not self._worth_keeping():
            # A job that failed before anything was done must not bind the next command to its settings.
            self.clean_up()
            with contextlib.suppress(OSError):
                self.folder.rmdir()  # only if it is empty, as it was before
        os.close(self._lock)

    def _worth_keeping(self) -> bool:
        """Whether there is anything that a continuation need not do again."""
        if any(journal.stat().st_size for journal in journals(self.job)):
            return True
        return any(
            folder.is_dir() and any(folder.iterdir()) for name in WORK_FOLDERS for folder in self.job.glob(f"{name}*")
        )

    def clean_up(self) -> None:
        """Remove what only an unfinished job needs."""
        # job.json first: without it, whatever a kill leaves of the rest is no job any more.
        with contextlib.suppress(OSError):
            (self.job / "job.json").unlink()
        shutil.rmtree(self.job, ignore_errors=True)

    def _clear(self) -> None:
        """Remove what an older result or job left: anything that could be taken for part of the new model."""
        # config.json first: from here on the folder is no model.
        for name in ("config.json", RECORD, SAFE_INDEX, PICKLE_INDEX):
            (self.folder / name).unlink(missing_ok=True)
        for entry in self.folder.iterdir():
            if entry.is_file() and entry.suffix in (".safetensors", ".bin", ".py"):
                entry.unlink()
        for entry in self.job.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()

    def write_file(self, name: str, data: bytes) -> None:
        """Write a small file of the checkpoint, whole or not at all."""
        with disk_errors(self.folder):
            atomic_write(self.folder / name, data)


def journals(job: Path) -> list[Path]:
    """The journals in a job's folder: of all processes of the last run, and what earlier runs left."""
    return sorted(job.glob(f"{Path(JOURNAL).stem}*{Path(JOURNAL).suffix}"))


class ShardWriter:
    """The weight files of one job: laid out beforehand, filled in any order, tensor by tensor.

    Thread-safe: solvers may finish in any order. Memory does not depend on the size of the files. With several
    processes, all of them make one, and :meth:`join` completes the files.
    """

    def __init__(self, output: OutputFolder, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
        """Open the journal and find out what is done.

        Args:
            output: the folder, already entered.
            shards: weight file -> its tensors.
        """
        self._output = output
        self._files = {name: _ShardFile(output, name, infos) for name, infos in shards.items()}
        self._where = {info.name: file for file in self._files.values() for info in file.infos}
        self._lock = threading.Lock()
        self._group = output.group
        self._journal_path = self._group.own(output.job / Path(JOURNAL).stem).with_suffix(Path(JOURNAL).suffix)
        self.reports: dict[str, dict[str, Any]] = {}
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._recorded = time.monotonic()
        self._note_done(self._group.share(self._resume() if self._group.leader else []))
        with disk_errors(output.folder):
            self._journal = os.open(self._journal_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def _resume(self) -> list[dict[str, Any]]:
        """What earlier runs have finished, in one journal from here on."""
        found = journals(self._output.job)
        entries = [entry for path in found for entry in self._read_journal(path)]
        with disk_errors(self._output.folder):
            if found:
                data = b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)
                atomic_write(self._output.job / JOURNAL, data)
            for path in found:
                if path.name != JOURNAL:
                    path.unlink()
            if self._group.size > 1:
                # Several processes that reserve room at once could meet in what another one has written.
                for file in self._files.values():
                    file.prepare()
        return entries

    def _read_journal(self, path: Path) -> list[dict[str, Any]]:
        # A torn last line is a step whose end was not recorded: it is done again. So is one whose file is gone.
        return [
            entry
            for entry in read_json_lines(path)
            if problem(entry, _JOURNAL_FIELDS) is None
            and all(name in self._where and self._where[name].survives() for name in entry["tensors"])
        ]

    def _note_done(self, entries: Iterable[Mapping[str, Any]]) -> None:
        for entry in entries:
            self.reports[entry["step"]] = entry["report"]
            for name in entry["tensors"]:
                self._where[name].done.add(name)

    def join(self) -> list[tuple[str, int]]:
        """Wait until every process has done its share and closed; the leader then gives the files their final names.

        Returns:
            As :meth:`finish`; nothing but in the leader of several processes.

        Raises:
            JobError: another process has ended, or what it wrote cannot be seen from here.
        """
        self._group.wait()
        if self._group.size == 1 or not self._group.leader:
            return []
        for path in journals(self._output.job):
            self._note_done(self._read_journal(path))
        missing = [file.name for file in self._files.values() if not file.is_full()]
        if missing:
            raise JobError(
                f"{listing(missing)} lack what another process wrote; all must see the same {self._output.folder}, "
                "and the same command goes on where it stopped"
            )
        with disk_errors(self._output.folder):
            return self._complete()

    def is_done(self, key: str) -> bool:
        """Whether a step was finished, now or before an interruption."""
        return key in self.reports

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Put bytes of one tensor into its file.

        Args:
            name: the tensor.
            data: its bytes from ``offset`` on.
            offset: position within the tensor.
        """
        with disk_errors(self._output.folder):
            self._where[name].write(name, data, offset)

    def finish(self, key: str, tensors: Iterable[str], report: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Say that all data of a step were written.

        Returns:
            ``(name, bytes)`` of the weight files that are complete with it and have got their final name.
        """
        names = list(tensors)
        with self._lock:
            self._pending.append({"step": key, "tensors": names, "report": dict(report)})
            self._pending_bytes += sum(self._where[name].sizes[name] for name in names)
            for name in names:
                self._where[name].done.add(name)
            full = any(self._where[name].is_full() for name in names)
            late = time.monotonic() - self._recorded > BATCH_SECONDS
        return self.record() if full or late or self._pending_bytes >= BATCH_BYTES else []

    def record(self) -> list[tuple[str, int]]:
        """Make finished steps durable: data, then the journal, then the final names. Returns as :meth:`finish`."""
        with disk_errors(self._output.folder), self._lock:
            if self._pending:
                for file in {
                    self._where[name].name: self._where[name] for e in self._pending for name in e["tensors"]
                }.values():
                    file.sync()
                os.write(self._journal, b"".join(json.dumps(entry).encode() + b"\n" for entry in self._pending))
                os.fsync(self._journal)
                self.reports.update({entry["step"]: entry["report"] for entry in self._pending})
            self._pending, self._pending_bytes, self._recorded = [], 0, time.monotonic()
            return self._complete() if self._group.size == 1 else []

    def _complete(self) -> list[tuple[str, int]]:
        return [(file.name, file.size) for file in self._files.values() if file.complete_if_full()]

    def close(self) -> None:
        """Close all files; what is not finished stays for the next run."""
        os.close(self._journal)
        for file in self._files.values():
            file.close()


class _ShardFile:
    """One weight file, under its partial name until it is complete."""

    def __init__(self, output: OutputFolder, name: str, infos: Sequence[TensorInfo]) -> None:
        self.name, self.infos = name, infos
        self.header, self.starts, self.size = layout(infos)
        self.sizes = {info.name: info.nbytes for info in infos}
        self.done: set[str] = set()
        self._final = output.folder / name
        self._partial = output.job / f"{name}.partial"
        self._handle = -1
        self._opening = threading.Lock()

    def survives(self) -> bool:
        """Whether what an earlier run wrote is still there."""
        return any(path.is_file() and path.stat().st_size == self.size for path in (self._final, self._partial))

    def prepare(self) -> None:
        """Reserve the room, unless the file is complete."""
        if not self._final.is_file() or self._final.stat().st_size != self.size:
            self._open()
            self.close()

    def write(self, name: str, data: memoryview, offset: int) -> None:
        assert offset + len(data) <= self.sizes[name]
        handle, position = self._open(), self.starts[name] + offset
        while data:
            count = os.pwrite(handle, data, position)
            data, position = data[count:], position + count

    def _open(self) -> int:
        with self._opening:
            if self._handle < 0:
                self._handle = os.open(self._partial, os.O_RDWR | os.O_CREAT, 0o644)
                if os.fstat(self._handle).st_size != self.size:
                    _reserve(self._handle, self.size)
                os.pwrite(self._handle, self.header, 0)
            return self._handle

    def sync(self) -> None:
        if self._handle >= 0:
            os.fsync(self._handle)

    def is_full(self) -> bool:
        """Whether every tensor is in the file."""
        return len(self.done) == len(self.infos)

    def complete_if_full(self) -> bool:
        """Give the file its final name if every tensor is in it."""
        if not self.is_full() or not self._partial.exists():
            return False
        self.sync()
        self.close()
        os.replace(self._partial, self._final)
        sync_folder(self._final.parent)
        return True

    def close(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)
        self._handle = -1


def _reserve(handle: int, size: int) -> None:
    """Give a file its size and claim the room for it, so that a full disk shows before the work and not after it."""
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError as error:
        # Some file systems cannot reserve; that one has no room is for the caller.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
    os.ftruncate(handle, size)


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the operating system says about a disk into one sentence.

    Raises:
        JobError: writing failed; what is finished stays, and the same command goes on from there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise JobError(
                f"no space left for {folder} ({error.strerror}); free some and run the same command again, "
                "which goes on where it stopped"
            ) from None
        raise JobError(
            f"{error.filename or folder} could not be written ({error.strerror}); the same command goes on once it can"
        ) from None


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that its name never shows half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

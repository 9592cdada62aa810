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
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from svdconvert.fields import OBJECT, require
from svdconvert.jobs.journal import journals
from svdconvert.jobs.own_files import JOB_FILE, JOB_FOLDER, refuse_foreign, refuse_in_the_way, written_files
from svdconvert.jobs.record import RECORD, read_record
from svdconvert.machine.processes import Group
from svdconvert.sentences import asked
from svdconvert.storage.differences import refuse_other_settings
from svdconvert.storage.disk import atomic_write, disk_errors
from svdconvert.storage.documents import in_json_types, read_json
from svdconvert.storage.locks import FolderLock

# Folders in the job's folder whose content is worth going on with: downloads, statistics, decompositions.
WORK_FOLDERS = ("source", "work")

_ELSEWHERE = "give another folder, or empty this one"
_START_ANEW = f"or add {asked('overwrite', True)} to start again"
_JOB_FIELDS = {"settings": OBJECT}


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
        self._job_file = self.job / JOB_FILE
        self.settings: dict[str, Any] = in_json_types(settings)
        self.overwrite = overwrite
        self.finished = False
        self._files: list[str] = []
        self._lock = FolderLock(folder, self.job / "lock", f"give another folder as {asked('out')}")
        refuse_foreign(folder, overwrite=overwrite)
        if not overwrite and folder.is_dir():
            self._find_earlier_run()

    def _find_earlier_run(self) -> None:
        """Find a job or a result in the folder, and see that it is of these settings."""
        self._files = sorted(written_files(self.folder))
        if self._job_file.exists():
            begun = read_json(self._job_file, "", _ELSEWHERE)
            require(begun, _JOB_FIELDS, self._job_file, _ELSEWHERE)
            what, advice = f"{self.folder} holds an unfinished job with", f"finish it as it was begun, {_START_ANEW}"
            refuse_other_settings(begun["settings"], self.settings, what, advice)
        elif (self.folder / RECORD).is_file() and (self.folder / "config.json").is_file():
            what, advice = f"{self.folder} holds a converted model with", f"give another folder, {_START_ANEW}"
            refuse_other_settings(read_record(self.folder).settings, self.settings, what, advice)
            self.finished = True

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
                elif not self._job_file.exists():
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
        job = {"settings": self.settings, "files": self._files}
        atomic_write(self._job_file, json.dumps(job, indent=1).encode())

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
        if not self.group.leader and not self._job_file.exists():
            # The leader has cleaned up while this process still shared the lock: then it is the last one's to remove.
            over = True
            self._lock.discard()
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
            self._job_file.unlink(missing_ok=True)
            clear_folder(self.job)

    def _clear(self) -> None:
        """Remove the result and the job that are here, by their own account."""
        ours = written_files(self.folder)
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


@contextlib.contextmanager
def held_result(folder: Path) -> Iterator[None]:
    """Keep jobs away from a finished result while something is added to it.

    Raises:
        InputError: one is at it, or the folder cannot be written.
    """
    job = folder / JOB_FOLDER
    lock = FolderLock(folder, job / "lock", f"give another file as {asked('out')}")
    lock.acquire()
    try:
        yield
    finally:
        lock.release(remove=True)
        with contextlib.suppress(OSError):
            job.rmdir()


def clear_folder(job: Path, *, ignore_errors: bool = False) -> None:
    """Remove all that is in a job's folder but its lock."""
    for entry in job.iterdir() if job.is_dir() else ():
        with contextlib.suppress(*([OSError] if ignore_errors else [])):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif not entry.name.startswith("lock"):
                entry.unlink()

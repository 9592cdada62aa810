"""The weight files of a job: laid out beforehand, filled in any order, and named when they are complete.

What is said to be done can be relied on: a step is recorded when its data are on the disk; a file gets its final name
when all its steps are recorded. Records hold for the file beside which they were found, as long as that has its size
and its header. Where a run finds records and files that do not fit each other, it drops those records, does their steps
again, and where a file that has its final name lacks one, that file goes back under its partial name, with all it
holds.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svdconvert.errors import JobError
from svdconvert.jobs.journal import NAME, Entry, Journal, journals, read_journal, rewrite_journal
from svdconvert.jobs.output import OutputFolder
from svdconvert.jobs.shard_file import ShardFile
from svdconvert.storage.disk import disk_errors
from svdconvert.tensors import TensorInfo
from svdconvert.words import listing

# What may be lost to a kill: data are made durable and recorded in batches, since every batch costs several fsyncs.
BATCH_BYTES = 32_000_000
BATCH_SECONDS = 5.0


def new_digest() -> hashlib.blake2b:
    """What the data of a stored tensor are known by."""
    return hashlib.blake2b(digest_size=16)


class ShardWriter:
    """The weight files of one job, tensor by tensor.

    Thread-safe: solvers may finish in any order. Memory does not depend on the size of the files. With several
    processes, all of them make one, and :meth:`join` completes the files.

    Attributes:
        reports: of the steps that are done, by their keys.
        digests: of the tensors that are done, hexadecimal; of several processes the leader has all after :meth:`join`.
    """

    def __init__(self, output: OutputFolder, shards: Mapping[str, Sequence[TensorInfo]]) -> None:
        """Open the journal and find out what is done.

        Args:
            output: the folder, already entered.
            shards: weight file -> its tensors.
        """
        self._output = output
        self._files = {name: ShardFile(output, name, infos) for name, infos in shards.items()}
        self._where = {info.name: file for file in self._files.values() for info in file.infos}
        self._lock = threading.Lock()
        self._group = output.group
        self._journal_path = self._group.own(output.job / Path(NAME).stem).with_suffix(Path(NAME).suffix)
        self.reports: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        self._begun: dict[str, hashlib.blake2b] = {}
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._recorded = time.monotonic()
        self._broken = False
        with disk_errors(output.folder):
            self._note_done(self._group.share(self._resume() if self._group.leader else []))
            self._journal = Journal(self._journal_path)

    def _resume(self) -> list[Entry]:
        """What earlier runs have finished, in one journal from here on, and the files as they fit it."""
        earlier = journals(self._output.job)
        for file in self._files.values():
            file.find()
        entries = [entry for path in earlier for entry in self._entries(path)]
        if earlier:
            # First of all: no later run may find a record of what is given up below.
            rewrite_journal(self._output.job / NAME, entries)
        for path in earlier:
            if path.name != NAME:
                path.unlink()
        recorded = {name for entry in entries for name in entry["tensors"]}
        for file in self._files.values():
            file.fit(recorded)
            if self._group.size > 1:
                # Several processes that reserve room at once could meet in what another one has written.
                file.prepare()
        return entries

    def _entries(self, path: Path) -> list[Entry]:
        """The entries of a journal whose data are still there."""
        return [
            entry
            for entry in read_journal(path)
            if all(name in self._where and self._where[name].found for name in entry["tensors"])
        ]

    def _note_done(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.reports[entry["step"]] = entry["report"]
            self.digests.update(entry["tensors"])
            for name in entry["tensors"]:
                self._where[name].done.add(name)

    def join(self) -> list[tuple[str, int]]:
        """Wait until every process has done its share and closed; the leader then gives the files their final names.

        Returns:
            As :meth:`finish`; nothing but in the leader of several processes.

        Raises:
            JobError: another process has ended, or what it wrote cannot be seen from here, or a file has gone.
        """
        self._group.wait()
        if not self._group.leader:
            return []
        completed = []
        if self._group.size > 1:
            with disk_errors(self._output.folder):
                for file in self._files.values():
                    file.find()
                for path in journals(self._output.job):
                    self._note_done(self._entries(path))
                missing = [file.name for file in self._files.values() if not file.is_full()]
                if missing:
                    raise JobError(
                        f"{listing(missing)} lack what another process wrote; let all processes see the same "
                        f"{self._output.folder} and run the same command to continue"
                    )
                completed = self._complete()
        gone = [file.name for file in self._files.values() if not file.is_final()]
        if gone:
            raise JobError(f"{self._output.folder} lost {listing(gone)}; run the same command to write it again")
        return completed

    def is_done(self, key: str) -> bool:
        """Whether a step was finished, now or before an interruption."""
        return key in self.reports

    def write(self, name: str, data: memoryview, offset: int = 0) -> None:
        """Put bytes of one tensor into its file, which come in their order.

        Args:
            name: the tensor.
            data: its bytes from ``offset`` on.
            offset: position within the tensor.
        """
        with disk_errors(self._output.folder):
            self._where[name].write(name, data, offset)
        digest = new_digest() if offset == 0 else self._begun[name]
        digest.update(data)
        self._begun[name] = digest

    def finish(self, key: str, tensors: Iterable[str], report: Mapping[str, Any]) -> list[tuple[str, int]]:
        """Say that all data of a step were written.

        Returns:
            ``(name, bytes)`` of the weight files that are complete with it and have got their final name.
        """
        names = {name: self._begun.pop(name, new_digest()).hexdigest() for name in tensors}
        with self._lock:
            self._pending.append({"step": key, "tensors": names, "report": dict(report)})
            self._pending_bytes += sum(self._where[name].sizes[name] for name in names)
            written = {name for entry in self._pending for name in entry["tensors"]}
            full = any(self._where[name].is_full(written) for name in names)
            late = time.monotonic() - self._recorded > BATCH_SECONDS
        return self.record() if full or late or self._pending_bytes >= BATCH_BYTES else []

    def record(self) -> list[tuple[str, int]]:
        """Make finished steps durable: data, then the journal, then the final names. Returns as :meth:`finish`.

        After an error it does nothing: what could not be synced once may be lost though syncing it again succeeds,
        and the next run does it again.
        """
        with disk_errors(self._output.folder), self._lock:
            if self._broken:
                return []
            self._broken = True
            if self._pending:
                for file in {self._where[name].name for entry in self._pending for name in entry["tensors"]}:
                    self._files[file].sync()
                self._journal.append(self._pending)
                self._note_done(self._pending)
            self._pending, self._pending_bytes, self._recorded = [], 0, time.monotonic()
            completed = self._complete() if self._group.size == 1 else []
            self._broken = False
            return completed

    def _complete(self) -> list[tuple[str, int]]:
        return [(file.name, file.size) for file in self._files.values() if file.complete_if_full()]

    def close(self) -> None:
        """Close all files; what is not finished stays for the next run."""
        with disk_errors(self._output.folder):
            self._journal.close()
            for file in self._files.values():
                file.close()

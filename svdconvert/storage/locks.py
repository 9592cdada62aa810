"""Locks on folders: two commands never write the same one, and nobody reads what another one is writing.

A lock is a file with the holder's process in it, held by flock; it falls with its process. Where the file system has
no flock, a second file claims the folder: whoever finds it looks whether that process still runs.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.machine.processes import current
from svdconvert.sentences import asked
from svdconvert.storage.disk import NOT_ALLOWED, UNSUPPORTED, create, disk_errors, make_folder, write_all
from svdconvert.storage.documents import json_or_none

# What a file system says that has no locks.
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})

# The lock of a folder of statistics.
STATISTICS_LOCK = ".stats.lock"

# A lock file may be removed between its opening and its locking; more often than so it is no coincidence.
_TRIES = 100


class FolderLock:
    """A lock on a folder."""

    def __init__(self, folder: Path, file: Path, advice: str) -> None:
        """Prepare; nothing is taken yet.

        Args:
            folder: what is locked, for messages.
            file: the lock's file; folders that it lies in are created.
            advice: what to do where it cannot be created.
        """
        self._folder, self._file, self._advice = folder, file, advice
        self._claim = file.with_name(f"{file.name}.pid")
        self._handle, self._claimed = -1, False

    def acquire(self, *, shared: bool = False, member: bool = False) -> None:
        """Take it, at once or not at all.

        Args:
            shared: others may share it.
            member: another process of the same job holds it, and is the one that others look at.

        Raises:
            InputError: another process has it, which is named; or the file may not be created.
            JobError: the disk fails.
        """
        for _ in range(_TRIES):
            make_folder(self._file.parent, self._advice)
            with disk_errors(self._folder):
                try:
                    self._handle = create(self._file, os.O_RDWR)
                except FileNotFoundError:  # removed by whoever has just ended
                    continue
                except OSError as error:
                    if error.errno not in NOT_ALLOWED:
                        raise
                    text = f"{self._folder} cannot be written ({error.strerror}); {self._advice}"
                    raise InputError(text) from None
            try:
                fcntl.flock(self._handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError as error:
                self._close()
                if error.errno in _HELD:
                    raise self._refusal(_read(self._file)) from None
                if error.errno not in _NO_LOCKS:
                    with disk_errors(self._folder):
                        raise
                if not member:
                    self._take_claim(shared)
                return
            if self._is_current():
                self._tell()
                return
            self._close()
        raise InputError(f"{self._file} cannot be locked; remove it if no other svdconvert is running there")

    def share(self) -> None:
        """Let the other processes of the same job share it."""
        if self._handle >= 0:
            with disk_errors(self._folder):
                fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def release(self, *, remove: bool) -> None:
        """Let go.

        Args:
            remove: nobody needs the file any more; of a shared lock it stays until its last holder goes.
        """
        if self._claimed:
            self._claimed = False
            with contextlib.suppress(OSError):
                self._claim.unlink()
        if remove:
            with contextlib.suppress(OSError):
                if self._handle >= 0:
                    fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                try:
                    self._file.unlink()
                except OSError:  # where nothing can be removed that is open
                    self._close()
                    self._file.unlink()
        self._close()

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _is_current(self) -> bool:
        """Whether the file that is locked is still the one of that name."""
        try:
            named = self._file.stat()
        except OSError:
            return False
        own = os.fstat(self._handle)
        return (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino)

    def _tell(self) -> None:
        """Write down who holds it; that is for messages alone."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            write_all(self._handle, json.dumps(_self()).encode())

    def _take_claim(self, shared: bool) -> None:
        """The lock where there is no flock; one that is shared only looks whether somebody writes."""
        for _ in range(_TRIES):
            found = self._found_claim()
            if found is not None:
                if not _is_gone(found):
                    raise self._refusal(found, self._claim)
                self._set_aside(found)
            if shared:
                return
            with disk_errors(self._folder):
                try:
                    handle = create(self._claim, os.O_WRONLY | os.O_EXCL)
                except FileExistsError:
                    continue
                try:
                    write_all(handle, json.dumps(_self()).encode())
                except OSError:
                    self._claim.unlink(missing_ok=True)
                    raise
                finally:
                    os.close(handle)
            self._claimed = True
            return
        raise self._refusal(_read(self._claim), self._claim)

    def _found_claim(self) -> dict[str, Any] | None:
        try:
            self._claim.stat()
        except FileNotFoundError:
            return None
        except OSError:
            pass
        return _read(self._claim)

    def _set_aside(self, found: dict[str, Any]) -> None:
        """Remove the claim of a process that is gone; another one may have done so, and be at work already."""
        aside = self._claim.with_name(f"{self._claim.name}.{os.getpid()}")
        with disk_errors(self._folder):
            try:
                os.rename(self._claim, aside)
            except FileNotFoundError:
                return
            if (now := _read(aside)) != found:
                os.rename(aside, self._claim)
                raise self._refusal(now, self._claim)
            aside.unlink()

    def _refusal(self, owner: dict[str, Any], claim: Path | None = None) -> InputError:
        who = " (process {pid} on {host}, since {since})".format(**owner) if _is_owner(owner) else ""
        advice = "wait for it to end"
        if claim is not None:
            advice += f", or remove {claim} if it does not run any more"
        return InputError(f"{self._folder} is in use by another svdconvert{who}; {advice}")


@contextlib.contextmanager
def working(folder: Path) -> Iterator[None]:
    """Hold a folder of decompositions; of several processes all do. Arguments and errors as of :func:`writing`."""
    with writing(folder, ".work.lock", f"give another folder as {asked('work')}"):
        yield


@contextlib.contextmanager
def collected(folder: Path) -> Iterator[None]:
    """Read a folder of statistics while nobody writes it. Errors as of :func:`writing`."""
    with reading(folder, STATISTICS_LOCK):
        yield


@contextlib.contextmanager
def writing(folder: Path, name: str, advice: str) -> Iterator[None]:
    """Hold a folder alone.

    Args:
        folder: the folder.
        name: of the lock's file in it, which begins with a dot and is removed at the end.
        advice: what to do where it cannot be written.

    Raises:
        As :meth:`FolderLock.acquire`.
    """
    group = current()
    lock = FolderLock(folder, folder / name, advice)
    with group.leader_first():
        lock.acquire(shared=not group.leader, member=not group.leader)
        if group.size > 1:
            lock.share()
    try:
        yield
    finally:
        lock.release(remove=True)


@contextlib.contextmanager
def reading(folder: Path, name: str) -> Iterator[None]:
    """Keep writers away from a folder; where no lock can be written, nobody else writes either."""
    lock = FolderLock(folder, folder / name, "") if os.access(folder, os.W_OK) else None
    if lock is not None:
        lock.acquire(shared=True)
    try:
        yield
    finally:
        if lock is not None:
            lock.release(remove=True)


def _self() -> dict[str, Any]:
    pid = os.getpid()
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"pid": pid, "host": socket.gethostname(), "since": since, "started": _started(pid)}


def _read(path: Path) -> dict[str, Any]:
    return json_or_none(path) or {}


def _is_owner(owner: dict[str, Any]) -> bool:
    return isinstance(owner.get("pid"), int) and all(isinstance(owner.get(key), str) for key in ("host", "since"))


def _is_gone(owner: dict[str, Any]) -> bool:
    """Whether the process that claims a folder has ended, as far as can be known from here."""
    if not _is_owner(owner) or owner["host"] != socket.gethostname():
        return False
    try:
        os.kill(owner["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        pass
    return owner.get("started") is not None and _started(owner["pid"]) != owner["started"]


def _started(pid: int) -> int | None:
    """When a process was started, in ticks of its machine; its number alone may have been given out again."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            return int(handle.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None

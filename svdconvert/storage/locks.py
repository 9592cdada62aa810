"""Locks on folders: two commands never write the same one, and none reads a folder while another writes it.

A lock is a file that names the holder's process and is held by flock; it ends with its process. Where the file system
has no flock, a second file claims the folder, and whoever finds it checks whether that process still runs.
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

# Errors of a file system without locks.
_NO_LOCKS = UNSUPPORTED | {errno.ENOLCK}
_HELD = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})

# The lock of a folder of statistics.
STATISTICS_LOCK = ".stats.lock"

# A lock file may be removed between opening and locking it; this often it is not a coincidence.
_TRIES = 100


class FolderLock:
    """A lock on a folder."""

    def __init__(self, folder: Path, file: Path, advice: str) -> None:
        """Prepare a lock, without taking it.

        Args:
            folder: the locked folder, for messages.
            file: the lock's file; its parent folders are created.
            advice: what to do if it cannot be created.
        """
        self._folder, self._file, self._advice = folder, file, advice
        self._claim = file.with_name(f"{file.name}.pid")
        self._handle, self._claimed = -1, False

    def acquire(self, *, shared: bool = False, member: bool = False) -> None:
        """Take the lock, at once or not at all.

        Args:
            shared: others may share it.
            member: another process of the same job holds it and is checked by others.

        Raises:
            InputError: another process holds it, which is named; or the file cannot be created.
            JobError: the disk fails.
        """
        for _ in range(_TRIES):
            make_folder(self._file.parent, self._advice)
            with disk_errors(self._folder):
                try:
                    self._handle = create(self._file, os.O_RDWR)
                except FileNotFoundError:  # removed by a process that has just ended
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
        """Let the other processes of the same job share the lock."""
        if self._handle >= 0:
            with disk_errors(self._folder):
                fcntl.flock(self._handle, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def release(self, *, remove: bool) -> None:
        """Release the lock.

        Args:
            remove: delete the file too; that of a shared lock stays until its last holder ends.
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
                except OSError:  # where open files cannot be removed
                    self._close()
                    self._file.unlink()
        self._close()

    def discard(self) -> None:
        """Delete the file of a lock that was let go, if nobody else holds it."""
        with contextlib.suppress(OSError):
            self._handle = os.open(self._file, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if self._is_current():
                self._file.unlink()
        self._close()

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.close(handle)

    def _is_current(self) -> bool:
        """Whether the locked file still has its name."""
        try:
            named = self._file.stat()
        except OSError:
            return False
        locked = os.fstat(self._handle)
        return (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino)

    def _tell(self) -> None:
        """Write down the holder, for messages only."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._handle, 0)
            write_all(self._handle, json.dumps(_self()).encode())

    def _take_claim(self, shared: bool) -> None:
        """Lock without flock; a shared lock only checks that nobody writes."""
        for _ in range(_TRIES):
            claim = self._found_claim()
            if claim is not None:
                if not _is_gone(claim):
                    raise self._refusal(claim, self._claim)
                self._set_aside(claim)
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

    def _set_aside(self, claim: dict[str, Any]) -> None:
        """Remove the claim of a process that has ended; another process may have claimed the folder meanwhile."""
        aside = self._claim.with_name(f"{self._claim.name}.{os.getpid()}")
        with disk_errors(self._folder):
            try:
                os.rename(self._claim, aside)
            except FileNotFoundError:
                return
            if (now := _read(aside)) != claim:
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
    """Hold a folder of decompositions, in all processes of a job. Errors as of :func:`writing`."""
    with writing(folder, ".work.lock", f"give another folder as {asked('work')}"):
        yield


@contextlib.contextmanager
def collected(folder: Path) -> Iterator[None]:
    """Read a folder of statistics while nobody writes it. Errors as of :func:`writing`."""
    with reading(folder, STATISTICS_LOCK):
        yield


@contextlib.contextmanager
def writing(folder: Path, name: str, advice: str) -> Iterator[None]:
    """Hold a folder exclusively.

    Args:
        folder: the folder.
        name: name of the lock's file in it, which begins with a dot and is removed at the end.
        advice: what to do if it cannot be written.

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
    """Keep writers away from a folder; where no lock can be written, nobody else can write either."""
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
    """Whether the process that claims a folder is known to have ended."""
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
    """Start time of a process in ticks, since its number alone may have been reused."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            return int(handle.read().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None

"""Writing to a disk: every byte is written or an error is raised, on any file system.

Network and FUSE file systems may lack syncing of folders, reserving of space, or renaming and removing of open files.
Guards against a power failure are left out where the file system has none; open files are never renamed or removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from svdconvert.errors import InputError, JobError
from svdconvert.words import size

# Errors of a file system that does not support a call.
UNSUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP})

# Errors that mean a wrong folder, not a failing disk.
NOT_ALLOWED = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}
)


def free_bytes(folder: Path) -> int:
    """Bytes free where a folder is or would be."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


def refuse_full(folder: Path, needed: int, what: str, advice: str) -> None:
    """Refuse to write more into a folder than its disk has free.

    Args:
        folder: where to.
        needed: bytes.
        what: what they are, with its preposition; may be empty.
        advice: what to do where they do not fit.

    Raises:
        InputError: they do not fit.
    """
    free = free_bytes(folder)
    if needed > free:
        raise InputError(
            f"{folder} needs {size(needed)}{what}, but the disk has only {size(free)} free, {size(needed - free)} too "
            f"little; {advice}"
        )


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn an operating system's error about a disk into one sentence.

    Raises:
        JobError: writing failed; finished work stays, and the same command continues from there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise JobError(
                f"no space left for {folder} ({error.strerror}); free some and run the same command to continue"
            ) from None
        raise JobError(
            f"{error.filename or folder} could not be written ({error.strerror}); fix that and run the same command "
            "to continue"
        ) from None


def make_folder(folder: Path, advice: str) -> None:
    """Create a folder and its parents.

    Raises:
        InputError: it may not be created; the sentence ends in the advice.
        JobError: the disk fails.
    """
    with disk_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno not in NOT_ALLOWED:
                raise
            raise InputError(f"{folder} cannot be written ({error.strerror}); {advice}") from None


def create(path: Path, flags: int = 0) -> int:
    """Open a file for writing, and create it with the permissions that the umask leaves."""
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC, 0o666)


def write_all(handle: int, data: bytes | memoryview) -> None:
    """Write all bytes at the file's position; the system may take them in parts."""
    view = memoryview(data)
    while view:
        view = view[_taken(os.write(handle, view)) :]


def pwrite_all(handle: int, data: bytes | memoryview, position: int) -> None:
    """Write all bytes at a position."""
    view = memoryview(data)
    while view:
        count = _taken(os.pwrite(handle, view, position))
        view, position = view[count:], position + count


def _taken(count: int) -> int:
    if count == 0:  # else this would loop for ever
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return count


def sync(handle: int) -> None:
    """Make a file's content durable, where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in UNSUPPORTED or error.errno in (errno.EACCES, errno.EPERM, errno.EISDIR):
            return
        raise
    try:
        os.fsync(handle)
    except OSError as error:
        # Windows shares say EBADF or EACCES.
        if error.errno not in UNSUPPORTED and error.errno not in (errno.EBADF, errno.EACCES, errno.EPERM, errno.EISDIR):
            raise
    finally:
        os.close(handle)


def reserve(handle: int, count: int) -> None:
    """Give a file its size and reserve the space, so that a full disk shows before the work and not after it."""
    try:
        os.posix_fallocate(handle, 0, count)
    except OSError as error:
        # Some file systems cannot reserve; a full one is for the caller to report.
        if error.errno not in UNSUPPORTED:
            raise
    os.ftruncate(handle, count)


def atomic_write(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    atomic_pieces(path, [data])


def atomic_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """:func:`atomic_write` for data in several pieces."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        handle = create(temporary, os.O_WRONLY | os.O_TRUNC)
        try:
            for piece in pieces:
                write_all(handle, piece)
            sync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)

"""Uploading a finished result."""

from __future__ import annotations

import os

from svdconvert.errors import InputError
from svdconvert.jobs.record import RECORD, read_record
from svdconvert.paths import user_path


def push(folder: str | os.PathLike[str], repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a finished result.

    Args:
        folder: what :func:`convert`, ``densify`` or ``fold`` wrote.
        repo: ``owner/name`` on the Hub; created if it does not exist.
        private: make it private if it has to be created.
        revision: branch to upload to.

    Returns:
        Where it is now.

    Raises:
        InputError: the folder is not finished, or the repository may not be written.
        JobError: the upload broke off; the same call continues it.
    """
    from svdconvert.storage.hub_push import check_push, push_folder

    path = user_path(folder)
    if not (path / "config.json").is_file() or not (path / RECORD).is_file():
        raise InputError(f"{path} holds no finished result of svdconvert; convert a model into it first")
    check_push(repo, private=private, revision=revision)
    name = read_record(path).source.name
    return push_folder(path, repo, private=private, revision=revision, message=f"Add {name}, factored by svdconvert")

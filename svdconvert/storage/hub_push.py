"""Pushing a finished result to the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)

from svdconvert.errors import InputError, JobError
from svdconvert.storage.hub_client import TIMEOUT, endpoint, hub_api, hub_errors, retried

_NOT_PUSHED = [
    ".svdconvert",
    ".svdconvert/*",
    ".cache/*",
    "*__pycache__/*",
    "*.tmp",
    "*.partial",
    "*.incomplete",
    "*.lock",
]
# Names of weight files by svdconvert and save_pretrained; other safetensors in a repository are somebody else's.
_OWN_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def check_push(repo: str, *, private: bool = False, revision: str | None = None) -> None:
    """Check before any work that the result can be pushed, and create repository and branch if they are missing.

    Args:
        repo: ``owner/name`` to push to; created if it does not exist.
        private: make a new repository private, and refuse an existing public one.
        revision: branch to push to; created if it does not exist.

    Raises:
        InputError: it cannot be pushed there.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{repo!r} is not a repository to push to; write it as `owner/name`")
    api = hub_api()
    with hub_errors(InputError, repo, revision):
        account = api.whoami()
        if _role(account) == "read":
            raise InputError(
                f"the Hugging Face token of {account.get('name')} can only read; "
                f"create one with write access at {endpoint()}/settings/tokens and set HF_TOKEN to it"
            )
        _ensure_repo(api, repo, private=private, revision=revision)


def push_folder(folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str) -> str:
    """Upload a finished folder; files that are already there are not sent again.

    Args:
        folder: the folder to upload; its job folder and temporary files are left out.
        repo: ``owner/name``.
        private: see :func:`check_push`.
        revision: branch to push to; None for the default branch.
        message: commit message.

    Returns:
        Address of the commit.

    Raises:
        InputError: the repository is public and should not be.
        JobError: the upload broke off.
    """
    api = hub_api()
    with hub_errors(JobError, repo, revision, str(folder)):
        _ensure_repo(api, repo, private=private, revision=revision)
        # Shards of an earlier upload under other names would be downloaded by everybody and used by nobody.
        stale = [
            name
            for name in api.list_repo_files(repo, revision=revision)
            if _OWN_WEIGHTS.fullmatch(name) and not (folder / name).exists()
        ]
        commit = retried(
            lambda: api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                ignore_patterns=list(_NOT_PUSHED),
                delete_patterns=stale or None,
            )
        )
    return str(getattr(commit, "commit_url", commit))


def _role(account: Mapping[str, Any]) -> str | None:
    """The rights of a token, where the Hub names them: ``read``, ``write`` or ``fineGrained``."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    return token.get("role")


def _ensure_repo(api: HfApi, repo: str, *, private: bool, revision: str | None) -> None:
    """Create repository and branch if they are missing, and check that they can be written to.

    Raises:
        InputError: the repository is public and should not be.
    """
    # Left out rather than False, so that an organisation's own default holds.
    visibility: dict[str, Any] = {"private": True} if private else {}
    api.create_repo(repo, exist_ok=True, **visibility)
    # create_repo is content with a repository that exists, whoever it belongs to. HfApi.auth_check has a parameter
    # for this only since 1.0.
    answer = get_session().get(
        f"{api.endpoint}/api/models/{repo}/auth-check/write",
        headers=build_hf_headers(token=True, library_name="svdconvert"),
        timeout=TIMEOUT,
    )
    if answer.status_code != 404:  # the repository exists by now, so 404 means that this Hub lacks the endpoint
        hf_raise_for_status(answer)
    if private and not api.model_info(repo, timeout=TIMEOUT).private:
        raise InputError(
            f"{repo} exists and is public; make it private at {endpoint()}/{repo}/settings, or give another name"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)

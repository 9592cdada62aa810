"""GGUF models on the Hub, which are downloaded as a whole into the Hugging Face cache."""

from __future__ import annotations

import logging

from svdconvert.errors import InputError, JobError
from svdconvert.sentences import printable
from svdconvert.storage.gguf_files import is_gguf, only_model, with_parts
from svdconvert.storage.gguf_source import GgufSource
from svdconvert.storage.hub_source import Checkout
from svdconvert.words import listing, size

logger = logging.getLogger(__name__)


def hub_gguf(checkout: Checkout, file: str | None) -> GgufSource:
    """The GGUF model of a repository.

    Args:
        checkout: the repository at one commit.
        file: the file in it that is meant; None for its only model.

    Raises:
        InputError: the file is not there, or the repository has several and none is named.
        JobError: the download broke off.
    """
    found = sorted(filter(is_gguf, checkout.sizes))
    if file is not None and file not in found:
        raise InputError(f"{checkout.where} has no {file}; its GGUF files are {listing(found, 12) or 'none'}")
    parts = with_parts(file or only_model(found, checkout.repo), checkout.sizes, checkout.where)
    for part in parts:
        if any(step in ("", ".", "..") for step in part.split("/")):
            raise InputError(f"{checkout.where} has a file {part!r} outside of itself; do not trust it")
    missing = {part: checkout.sizes[part] for part in parts if checkout.cached(part) is None}
    if missing:
        logger.warning(
            "fetching %s of %s (%s)", printable(listing(list(missing))), checkout.repo, size(sum(missing.values()))
        )
    paths = [checkout.fetch(part, JobError) for part in parts]
    readme = checkout.fetch("README.md", JobError) if "README.md" in checkout.sizes else None
    where = checkout.repo if file is None else f"{checkout.repo}/{file}"
    return GgufSource(paths, where, repo=checkout.repo, commit=checkout.commit, readme=readme)

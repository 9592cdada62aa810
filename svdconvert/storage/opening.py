"""From a user's MODEL to its source: a local folder, a GGUF file, a repository on the Hub, or a short name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from svdconvert.errors import InputError
from svdconvert.paths import user_path
from svdconvert.sentences import asked
from svdconvert.storage.gguf_files import gguf_files, is_gguf, is_gguf_only
from svdconvert.storage.source import LocalSource, Source, survey

if TYPE_CHECKING:
    from svdconvert.storage.gguf_source import GgufSource
    from svdconvert.storage.hub_source import Checkout

ALIASES: Mapping[str, str] = {
    f"polyglot-ko-{size}": f"EleutherAI/polyglot-ko-{size}" for size in ("1.3b", "3.8b", "5.8b", "12.8b")
}


def open_source(
    model: str,
    revision: str | None = None,
    *,
    need_weights: bool = True,
    download_folder: Path | None = None,
) -> Source:
    """Resolve a user's MODEL and open it.

    Args:
        model: a local folder, a GGUF file, ``owner/name`` on the Hub, ``owner/name/file.gguf``, or one of
            :data:`ALIASES`.
        revision: branch, tag or commit on the Hub.
        need_weights: see :class:`LocalSource`.
        download_folder: where weight files of the Hub are put while they are needed; None if they are never needed.

    Raises:
        InputError: there is no such model, or it cannot be used.
        JobError: a GGUF file, which is downloaded as a whole, could not be.
    """
    place = _resolve(model, revision)
    if isinstance(place, Path):
        source = _gguf(place)
        return source or LocalSource(place, need_weights=need_weights)
    repo, file = place
    from svdconvert.storage.hub_source import Checkout, HubSource

    checkout = Checkout(repo, revision)
    found = _hub_gguf(checkout, file)
    return found or HubSource(repo, revision, download_folder=download_folder, checkout=checkout)


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model, downloaded whole into the Hugging Face cache if it is on the Hub.

    Of a GGUF model, a folder that stands for it, see :meth:`svdconvert.storage.gguf_source.GgufSource.view`.

    Raises:
        InputError: there is no such model.
        JobError: the download broke off.
    """
    place = _resolve(model, revision)
    if isinstance(place, Path):
        source = _gguf(place)
        if source is not None:
            return source.view()
        survey(place)
        return place
    repo, file = place
    from svdconvert.storage.hub_source import Checkout, download_model

    checkout = Checkout(repo, revision)
    found = _hub_gguf(checkout, file)
    return found.view() if found else download_model(repo, revision, checkout=checkout)


def _gguf(place: Path) -> GgufSource | None:
    files = gguf_files(place)
    if files is None:
        return None
    from svdconvert.storage.gguf_source import GgufSource

    return GgufSource(files, str(place), readme=place / "README.md" if place.is_dir() else None)


def _hub_gguf(checkout: Checkout, file: str | None) -> GgufSource | None:
    if file is None and not is_gguf_only(checkout.sizes):
        return None
    from svdconvert.storage.hub_gguf import hub_gguf

    return hub_gguf(checkout, file)


def _resolve(model: str, revision: str | None) -> Path | tuple[str, str | None]:
    """A local folder or GGUF file; or the id of a Hub repository, and the file in it that is meant."""
    place = user_path(model)
    if place.is_dir() or (place.is_file() and is_gguf(place.name)):
        if revision:
            raise InputError(
                f"{asked('revision')} is for Hub repositories, but {model} is a local "
                f"{'folder' if place.is_dir() else 'file'}; leave it out"
            )
        return place
    if place.exists():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the weights")
    missing = f"there is no file {model!r}; give a GGUF file, or `owner/name/file.gguf` on the Hub"
    repo = ALIASES.get(model, model)
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:/([\w. /-]+\.gguf))?", repo)
    if match is None:
        if is_gguf(repo):
            raise InputError(missing)
        close = difflib.get_close_matches(model, ALIASES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; short names are {', '.join(ALIASES)}"
        raise InputError(f"there is no folder {model!r} and it is not an `owner/name` on the Hub{hint}")
    if match[2] is None and is_gguf(repo):
        raise InputError(missing)
    return match[1], match[2]

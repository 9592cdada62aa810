"""From a user's MODEL to its source: a local folder, a repository on the Hub, or a short name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path

from svdconvert.errors import InputError
from svdconvert.paths import user_path
from svdconvert.sentences import asked
from svdconvert.storage.source import LocalSource, Source, survey

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
        model: a local folder, ``owner/name`` on the Hub, or one of :data:`ALIASES`.
        revision: branch, tag or commit on the Hub.
        need_weights: see :class:`LocalSource`.
        download_folder: where weight files of the Hub are put while they are needed; None if they are never needed.

    Raises:
        InputError: there is no such model, or it cannot be used.
    """
    place = _resolve(model, revision)
    if isinstance(place, Path):
        source: Source = LocalSource(place, need_weights=need_weights)
    else:
        from svdconvert.storage.hub_source import HubSource

        source = HubSource(place, revision, download_folder=download_folder)
    return source


def local_folder(model: str, revision: str | None = None) -> Path:
    """The folder of a model, downloaded whole into the Hugging Face cache if it is on the Hub.

    Raises:
        InputError: there is no such model.
        JobError: the download broke off.
    """
    place = _resolve(model, revision)
    if isinstance(place, Path):
        survey(place)
        return place
    from svdconvert.storage.hub_source import download_model

    return download_model(place, revision)


def _resolve(model: str, revision: str | None) -> Path | str:
    """A local folder, or the id of a Hub repository."""
    folder = user_path(model)
    if folder.is_dir():
        if revision:
            raise InputError(
                f"{asked('revision')} is for Hub repositories, but {model} is a local folder; leave it out"
            )
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file; give the folder that holds config.json and the weights")
    repo = ALIASES.get(model, model)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        close = difflib.get_close_matches(model, ALIASES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; short names are {', '.join(ALIASES)}"
        raise InputError(f"there is no folder {model!r} and it is not an `owner/name` on the Hub{hint}")
    return repo

"""Which files make up a GGUF model: the one that a user names, or the only one of a folder, with all of its parts."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from svdconvert.errors import InputError
from svdconvert.storage.folders import ModelFolder, cached_repo
from svdconvert.words import listing

# As llama.cpp names the parts of a model that is in several files.
_PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def is_gguf(name: str) -> bool:
    """Whether a file is GGUF by its name."""
    return name.endswith(".gguf")


def is_gguf_only(names: Iterable[str]) -> bool:
    """Whether GGUF files are the only weights among others."""
    there = list(names)
    return any(map(is_gguf, there)) and not any(name.endswith(_OTHER_WEIGHTS) for name in there)


def gguf_files(place: Path) -> list[Path] | None:
    """The files of a GGUF model, in order.

    Args:
        place: the file, any of its parts, or a folder whose only weights are one such model.

    Returns:
        None where the place is something else.

    Raises:
        InputError: the folder has several models, or a part is missing, or it or README.md is outside of the folder.
    """
    if place.is_file() and is_gguf(place.name):
        names = {path.name for path in place.parent.iterdir()} if _PART.fullmatch(place.name) else {place.name}
        parts = [place.parent / name for name in with_parts(place.name, names, place.parent)]
        for part in parts:
            _check_part(part, named=part.name == place.name)
        return parts
    if not place.is_dir() or not is_gguf_only([path.name for path in place.iterdir() if path.is_file()]):
        return None
    listed = ModelFolder(place)
    name = only_model([name for name in listed.sizes if "/" not in name], place)
    found = with_parts(name, listed.sizes, place)
    listed.check([*found, "README.md"])
    return [place / part for part in found]


def only_model(names: Iterable[str], where: object) -> str:
    """The one GGUF model of a folder or repository, by its first file.

    Raises:
        InputError: there are several; they are named.
    """
    models: dict[str, str] = {}
    for name in sorted(filter(is_gguf, names)):
        part = _PART.fullmatch(name)
        models.setdefault(part["name"] if part else name, name)
    if len(models) > 1:
        found = [f"{where}/{name}" for name in models.values()]
        raise InputError(f"{where} holds several GGUF models; give one of them: {listing(found, 12)}")
    return next(iter(models.values()))


def with_parts(name: str, names: Iterable[str], where: object) -> list[str]:
    """All files of the model that a file belongs to, in order.

    Raises:
        InputError: one is missing.
    """
    part = _PART.fullmatch(name)
    if part is None:
        return [name]
    count, there = int(part["count"]), set(names)
    parts = [f"{part['name']}-{number:05d}-of-{part['count']}.gguf" for number in range(1, count + 1)]
    missing = [other for other in parts if other not in there]
    if missing or name not in parts:
        raise InputError(f"{where} lacks {listing(missing or [name])}, a part of {name}; fetch the missing files")
    return parts


def _check_part(part: Path, *, named: bool) -> None:
    """Refuse a part that leads out of its folder; the file that the user has named may be a link."""
    if named or not part.is_symlink() or cached_repo(part.parent) is not None:
        return
    if not part.resolve().is_relative_to(part.parent.resolve()):
        raise InputError(
            f"{part} is a link to {part.readlink()}, outside of the model's folder, and is not followed; put what it "
            "leads to in its place"
        )

"""The Hugging Face Hub: reading a checkpoint shard by shard.

Headers are read with HTTP range requests, so a plan costs a few hundred kilobytes whatever the size of the model.
Weight files are fetched when they are needed and deleted afterwards.
"""

from __future__ import annotations

import logging
import shutil
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    LocalEntryNotFoundError,
    build_hf_headers,
    hf_raise_for_status,
    http_backoff,
)

from svdconvert.errors import InputError, JobError, SvdconvertError
from svdconvert.families.towers import language_config
from svdconvert.sentences import printable
from svdconvert.storage.disk import refuse_full
from svdconvert.storage.documents import read_bytes, read_json
from svdconvert.storage.folders import ModelFolder
from svdconvert.storage.gguf_files import is_gguf
from svdconvert.storage.headers import MAX_HEADER_BYTES, parse_header, read_header
from svdconvert.storage.hub_client import TIMEOUT, hub_api, hub_errors, retried
from svdconvert.storage.mxfp4 import read_mxfp4
from svdconvert.storage.other_formats import refuse_other_format
from svdconvert.storage.packed_config import is_packed
from svdconvert.storage.side_files import SideFiles, choose_side_files, side_notes
from svdconvert.storage.source import (
    Source,
    check_type,
    merge_headers,
    one_by_one,
    parse_index,
    read_names,
    stock_weights,
    weight_files,
)
from svdconvert.storage.whole import language_tensors
from svdconvert.storage.wrappers import unwrap
from svdconvert.tensors import TensorInfo
from svdconvert.words import listing, size

logger = logging.getLogger(__name__)

# Headers of language models rarely exceed this, so one request per file is usually enough.
_HEADER_GUESS = 64 * 1024
_HEADER_THREADS = 8

_BOOKKEEPING = Path(".cache") / "huggingface"


class Checkout:
    """The files of one commit of a repository, fetched when they are needed.

    Attributes:
        where: its name in messages.
        commit: the commit's hash.
        sizes: bytes of every file, by path.
    """

    commit: str

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo = repo
        self.revision = revision
        self.where = repo if revision is None else f"{repo} (revision {revision})"
        self.api = hub_api()
        self.sizes = self._cached_files() if constants.HF_HUB_OFFLINE else self._listed_files()

    def _listed_files(self) -> dict[str, int]:
        """Pin the commit and list its files, name -> bytes."""
        with hub_errors(InputError, self.repo, self.revision):
            info = self.api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=TIMEOUT)
        if not info.sha:
            raise InputError(f"{self.where} has no commit; upload a model to it first")
        self.commit = info.sha
        return {f.rfilename: f.size or 0 for f in info.siblings or ()}

    def _cached_files(self) -> dict[str, int]:
        """Pin the commit and find its files in offline mode, name -> bytes."""
        snapshot = self._snapshot()
        if snapshot is None:
            raise InputError(
                f"HF_HUB_OFFLINE is set and {self.where} is not in the cache; "
                f"unset it, or fetch the model with `hf download {self.repo}` while there is a network"
            )
        self.commit = snapshot.name
        self.where = f"the cached copy of {self.where} (HF_HUB_OFFLINE is set)"
        files = ModelFolder(snapshot)
        files.check([*read_names(files.sizes), *filter(is_gguf, files.sizes)])
        return files.sizes

    def _snapshot(self) -> Path | None:
        """The commit's folder in the cache; None where it does not hold a model."""
        config = try_to_load_from_cache(self.repo, "config.json", revision=self.revision)
        if isinstance(config, str):
            return Path(config).parent
        try:
            found = Path(snapshot_download(self.repo, revision=self.revision, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        return found if any(is_gguf(path.name) for path in found.rglob("*")) else None

    def weights(self) -> tuple[list[str], bool, str | None]:
        """Find the weight files.

        Returns:
            ``(files, pickled, index)``; the last is None where there is no such file.

        Raises:
            InputError: there are no weights, or the index is wrong or names files that are missing.
        """
        index, files, pickled = weight_files((name for name in self.sizes if "/" not in name), self.where)
        if index is None:
            if not files:
                raise InputError(f"{self.where} has no weights; give a repository that holds a model")
            return files, pickled, None
        weight_map = parse_index(self.json(index, f"{self.where} has no {index}"), f"{index} of {self.where}")
        files = sorted(set(weight_map.values()))
        missing = [file for file in files if file not in self.sizes]
        if missing:
            raise InputError(
                f"{self.where} lacks {listing(missing)}, which {index} names; "
                "wait until its upload is complete, or give another revision"
            )
        return files, pickled, index

    def side_files(self, config: Mapping[str, Any], weights: Iterable[str]) -> SideFiles:
        """Which of the files that are not weights are kept."""
        return choose_side_files(
            self.sizes,
            lambda name: self.json(name, f"{self.where} has no {name}"),
            lambda name: read_bytes(self.fetch(name, InputError), "").decode("utf-8", errors="replace"),
            config,
            set(weights),
        )

    def config(self) -> dict[str, Any]:
        """Parsed ``config.json``.

        Raises:
            InputError: there is none, or the repository is not a model that transformers loads.
        """
        refuse_other_format(
            self.where,
            self.sizes,
            lambda name: self.json(name, f"{self.where} has no {name}"),
            has_weights=bool(stock_weights(self.sizes)),
        )
        return self.json("config.json", f"{self.where} has no config.json, so it is not a model")

    def json(self, file: str, missing: str) -> dict[str, Any]:
        """A JSON object; ``missing`` is the message if there is none."""
        if file not in self.sizes:
            raise InputError(missing)
        return read_json(self.fetch(file, InputError), missing)

    def cached(self, file: str) -> Path | None:
        """A file of this commit in the Hugging Face cache."""
        path = try_to_load_from_cache(self.repo, file, revision=self.commit)
        return Path(path) if isinstance(path, str) else None

    def fetch(self, file: str, kind: type[SvdconvertError], folder: Path | None = None) -> Path:
        """Download a file.

        Args:
            file: its name.
            kind: error to raise.
            folder: where to put it; None for the Hugging Face cache, which is looked up in any case.
        """
        cached = self.cached(file)
        if cached is not None:
            return cached
        with hub_errors(kind, self.repo, self.revision, file):
            return Path(
                retried(
                    lambda: self.api.hf_hub_download(
                        self.repo, file, revision=self.commit, local_dir=folder, etag_timeout=TIMEOUT
                    )
                )
            )


class HubSource(Source):
    """A checkpoint on the Hub, pinned to one commit.

    Attributes:
        revision: the branch, tag or commit requested.
        download_folder: where weight files are put while they are needed.
        download_bytes: size of every weight file that is not in the Hugging Face cache.
    """

    repo: str
    commit: str
    fetched = True

    def __init__(
        self,
        repo: str,
        revision: str | None = None,
        *,
        download_folder: Path | None,
        checkout: Checkout | None = None,
    ) -> None:
        """Resolve the revision and read config, index and headers.

        Args:
            repo: ``owner/name``.
            revision: branch, tag or commit; None for the default branch.
            download_folder: where weight files are put, one at a time; None if only headers are needed.
            checkout: the repository at that revision, if it has been listed already.

        Raises:
            InputError: the checkpoint does not exist, is not accessible, or cannot be used.
            JobError: pickled weights could not be downloaded.
        """
        self._checkout = checkout or Checkout(repo, revision)
        self.name = self.where = self.repo = repo
        self.revision = revision
        self.commit = self._checkout.commit
        self.download_folder = download_folder
        self._where = self._checkout.where
        self._sizes = self._checkout.sizes
        self._local: dict[str, Path] = {}
        self._in_flight: set[str] = set()
        self._headers: dict[str, list[TensorInfo]] = {}
        raw = self._checkout.config()
        self.config = language_config(raw, self.name)
        check_type(self.config, self.name)
        if is_packed(self.config):
            raise InputError(
                f"{repo} has packed weights, which are read from a folder alone; run `hf download {repo} --local-dir "
                "DIR` and give DIR"
            )
        self.files, self.pickled, index = self._checkout.weights()
        side = self._checkout.side_files(raw, [*self.files, *filter(None, [index])])
        self.side_files = list(side.taken)
        self.download_bytes = {file: self._sizes[file] for file in self.files if not self._checkout.cached(file)}
        self._headers = self._pickled_headers() if self.pickled else self._safe_headers()
        tensors, self.whole = language_tensors(merge_headers(self._headers), raw, self.where)
        read = read_mxfp4(tensors, self.config, self.name, pickled=self.pickled)
        self.config, self.stacks = read.config, read.stacks
        self.tensors, self.stored, note = unwrap(one_by_one(read.tensors, self.config), self.config)
        self.notes = (*filter(None, [note, read.note]), *side_notes(side, listing))
        if self.whole is not None:
            self.stored = {**self.whole.stored, **self.stored}
            self.notes = (self.whole.note(), *self.notes)

    def path(self, file: str) -> Path:
        """The local path of a file: in the Hugging Face cache if it is there, else downloaded now.

        Weight files go into the download folder, or into the cache if there is none; other files into the cache.

        Raises:
            JobError: it could not be fetched, or does not match its header on the Hub.
        """
        if file not in self._local:
            self._in_flight.add(file)
            try:
                path = self._checkout.fetch(file, JobError, self.download_folder if file in self.files else None)
            finally:
                self._in_flight.discard(file)
            if file in self._headers and not self.pickled:
                self._verify(file, path)
            self._local[file] = path
        return self._local[file]

    def release(self, file: str) -> None:
        """Delete a weight file, if it was downloaded for this job; files in the cache stay."""
        self._local.pop(file, None)
        if self.download_folder is None or file not in self.files:
            return
        (self.download_folder / file).unlink(missing_ok=True)
        download = self.download_folder / _BOOKKEEPING / "download"
        for suffix in (".metadata", ".lock"):
            (download / f"{file}{suffix}").unlink(missing_ok=True)
        # Another thread may be fetching the next file already.
        if not self._in_flight and not any((self.download_folder / other).exists() for other in self.files):
            # No transfer is running any more: only notes and fragments of failed transfers are left.
            shutil.rmtree(self.download_folder / _BOOKKEEPING, ignore_errors=True)
            with suppress(OSError):
                (self.download_folder / _BOOKKEEPING.parent).rmdir()

    def identity(self) -> dict[str, Any]:
        return {"repo": self.repo, "commit": self.commit}

    def card(self) -> str | None:
        if "README.md" not in self._sizes:
            return None
        return read_bytes(self.path("README.md"), "").decode("utf-8", errors="replace")

    def _verify(self, file: str, path: Path) -> None:
        """Check a local file against the header that the plan used."""
        try:
            same = read_header(path, file) == self._headers[file]
        except InputError:
            same = False
        if same:
            return
        if self.download_folder is not None and path == (self.download_folder / file).resolve():
            self.release(file)
            raise JobError(
                f"{file} arrived from {self.repo} damaged, or with another header than the Hub had shown, "
                "and was deleted; run the same command to fetch it again"
            )
        raise JobError(f"the cached file {path} is damaged; delete it and run the same command to continue")

    def _safe_headers(self) -> dict[str, list[TensorInfo]]:
        """Headers of safetensors files, without downloading the files."""
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            return dict(zip(self.files, pool.map(self._safe_header, self.files), strict=True))

    def _safe_header(self, file: str) -> list[TensorInfo]:
        cached = self._checkout.cached(file)
        if cached is not None:
            try:
                return read_header(cached, file)
            except InputError as error:
                raise InputError(f"{error.sentence.marked} (delete {cached} first)") from None
        with hub_errors(InputError, self.repo, self.revision, file):
            raw = self._first_bytes(file)
        return parse_header(raw, file, self._sizes[file])

    def _first_bytes(self, file: str) -> bytes:
        """At least the header of a safetensors file on the Hub, in one range request or two."""
        url = hf_hub_url(self.repo, file, revision=self.commit, endpoint=self._checkout.api.endpoint)
        size = self._sizes[file]
        raw = self._range(url, 0, min(size, _HEADER_GUESS))
        if len(raw) >= 8:
            end = 8 + struct.unpack("<Q", raw[:8])[0]
            # The parser refuses a length beyond the file or the format's limit.
            if len(raw) < end <= min(size, 8 + MAX_HEADER_BYTES):
                raw += self._range(url, len(raw), end)
        return raw

    def _range(self, url: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        headers = build_hf_headers(library_name="svdconvert")
        # A compressed answer would ignore the range.
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        response = http_backoff("GET", url, headers=headers, timeout=TIMEOUT, max_retries=2)
        hf_raise_for_status(response)
        body: bytes = response.content
        return body[start:end] if response.status_code == 200 else body

    def _pickled_headers(self) -> dict[str, list[TensorInfo]]:
        """Headers of pickles, which have to be downloaded whole.

        Raises:
            InputError: there is no folder to download to.
            JobError: they could not be downloaded.
        """
        from svdconvert.storage.pickled import pickled_header

        if self.download_bytes and self.download_folder is None:
            fetch = f"hf download {self.repo}"
            if self.revision is not None:
                fetch = f"hf download {self.repo} --revision {self.revision}"
            raise InputError(
                f"{self._where} has its weights only as pickles ({listing(self.files)}), which cannot be read over the "
                f"network; run `{fetch} --local-dir DIR` and give DIR"
            )
        if self.download_bytes:
            self._check_room()
            logger.warning(
                "%s has no safetensors; fetching %s (%s) as a whole",
                self.repo,
                printable(listing(list(self.download_bytes))),
                size(sum(self.download_bytes.values())),
            )
        return {file: pickled_header(self.path(file)) for file in self.files}

    def _check_room(self) -> None:
        """Refuse a download that does not fit on the disk, before it begins.

        Raises:
            InputError: there is not enough space.
        """
        assert self.download_folder is not None
        here = [file for file in self.download_bytes if (self.download_folder / file).exists()]
        needed = sum(count for file, count in self.download_bytes.items() if file not in here)
        refuse_full(
            self.download_folder,
            needed,
            f" at once for the pickles of {self.repo}",
            "free some, or choose a folder on another disk",
        )


def download_model(repo: str, revision: str | None = None, *, checkout: Checkout | None = None) -> Path:
    """Download a model into the Hugging Face cache: its weights in one format, and its other files.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the default branch.
        checkout: the repository at that revision, if it has been listed already.

    Returns:
        The folder that holds it.

    Raises:
        InputError: there is no such model, or no access to it.
        JobError: the download broke off.
    """
    checkout = checkout or Checkout(repo, revision)
    config = checkout.config()
    files, _, index = checkout.weights()
    code = [name for name in checkout.sizes if "/" not in name and name.endswith(".py")]
    others = {*code, "README.md", "svdconvert.json"} & checkout.sizes.keys()
    wanted = sorted({*checkout.side_files(config, [*files, *filter(None, [index])]).taken, *others})
    for file in (*wanted, *filter(None, [index]), *files):
        checkout.fetch(file, JobError)
    return checkout.fetch("config.json", JobError).parent

"""The Hugging Face Hub: reading a checkpoint shard by shard, and pushing a finished one.

Headers are read with HTTP range requests, so that a plan costs a few hundred kilobytes whatever the size of the
model, and weight files are fetched when they are asked for and deleted when they are given up. Works with
huggingface_hub from 0.26 to 2.x, which stand on three different HTTP libraries.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import os
import re
import shutil
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, errors, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    disable_progress_bars,
    get_session,
    hf_raise_for_status,
    http_backoff,
)

from svdconvert.documents import read_bytes, read_json
from svdconvert.errors import InputError, JobError, SvdconvertError
from svdconvert.folders import ModelFolder
from svdconvert.headers import MAX_HEADER_BYTES, TensorInfo, parse_header, read_header
from svdconvert.other_formats import refuse_other_format
from svdconvert.side_files import SideFiles, choose_side_files, side_notes
from svdconvert.source import (
    Source,
    check_type,
    listing,
    merge_headers,
    parse_index,
    read_names,
    stock_weights,
    weight_files,
)
from svdconvert.wrappers import unwrap

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# Headers of language models rarely exceed this, so that one request per file is usually enough.
_HEADER_GUESS = 64 * 1024
_HEADER_THREADS = 8
_TIMEOUT = 30.0
# On top of the retries inside huggingface_hub, which differ from version to version.
_ATTEMPTS = 3
_PAUSE = 1.0

_BOOKKEEPING = Path(".cache") / "huggingface"
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
# What svdconvert and save_pretrained call their weight files; other safetensors in a repository are somebody else's.
_OWN_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def _library_errors() -> tuple[type[Exception], type[Exception]]:
    """The HTTP error and the transport error of the library below huggingface_hub.

    Returns:
        ``(error, transport)`` of requests (before 1.0), httpx (1.x) or httpx2 (2.x).
    """
    base = errors.HfHubHTTPError.__bases__[0]
    library = importlib.import_module(base.__module__.partition(".")[0])
    return library.HTTPError, getattr(library, "RequestError", None) or library.RequestException


def _if_known(*names: str) -> tuple[type[Exception], ...]:
    """Exception classes that only newer versions of huggingface_hub have."""
    return tuple(getattr(errors, name) for name in names if hasattr(errors, name))


_HTTP_ERROR, _TRANSPORT_ERROR = _library_errors()
_LOG_IN = "log in with `hf auth login` or set HF_TOKEN"


@dataclass(frozen=True)
class _Rule:
    """How one kind of failure is told.

    Attributes:
        kinds: exception classes.
        problem: what is wrong, a format string.
        remedy: what to do, a format string in the imperative.
        statuses: HTTP statuses the rule is limited to; None for errors without a response.
        transient: whether trying again may help.
    """

    kinds: tuple[type[Exception], ...]
    problem: str
    remedy: str
    statuses: range | None = None
    transient: bool = False


def _http(first: int, last: int, problem: str, remedy: str, *, transient: bool = False) -> _Rule:
    return _Rule((errors.HfHubHTTPError, _HTTP_ERROR), problem, remedy, range(first, last + 1), transient)


# The first rule that fits wins, so subclasses stand above their bases: a gated repository is a RepositoryNotFoundError
# to huggingface_hub, and in some versions everything is an OSError.
_RULES: tuple[_Rule, ...] = (
    _Rule((errors.GatedRepoError,), "{repo} is gated", f"accept its conditions at {{page}} and {_LOG_IN}"),
    _Rule((errors.DisabledRepoError,), "{repo} has been disabled on the Hub", "use another copy of the model"),
    _Rule(
        (errors.RepositoryNotFoundError,),
        "{repo} does not exist on the Hub or is private",
        f"check the name, or {_LOG_IN} with an account that may read it",
    ),
    _Rule(
        (errors.RevisionNotFoundError,),
        "{repo} has no revision {revision!r}",
        "give a branch, tag or commit that {page} lists",
    ),
    _Rule(
        (errors.OfflineModeIsEnabled,),
        "HF_HUB_OFFLINE is set, so only cached files can be used and {file} is not among them",
        "unset HF_HUB_OFFLINE",
    ),
    _Rule((errors.LocalTokenNotFoundError,), "there is no Hugging Face token on this machine", _LOG_IN),
    _Rule(_if_known("OIDCError", "DeviceCodeError"), "logging in to the Hub failed ({detail})", _LOG_IN),
    # Raised for want of a connection; also an EntryNotFoundError.
    _Rule(
        (errors.LocalEntryNotFoundError,), "the connection to {endpoint} failed", "check the network", transient=True
    ),
    _Rule((errors.EntryNotFoundError,), "{repo} has no {file}", "check {page} and the revision"),
    _http(401, 401, "the Hub does not accept the Hugging Face token", f"make a new one and {_LOG_IN}"),
    _http(
        403,
        403,
        "the Hugging Face token does not permit this for {repo}",
        "use a token that does (see {endpoint}/settings/tokens)",
    ),
    _http(404, 404, "{repo} has no {file}", "check {page} and the revision"),
    _http(429, 429, "the Hub limits the number of requests", "wait some minutes", transient=True),
    _http(500, 599, "the Hub answered with error {status}", "wait until it works again", transient=True),
    _http(400, 499, "the Hub refused the request with error {status} ({detail})", "check {page}"),
    _Rule((errors.HFValidationError,), "{repo!r} is no valid repository name", "give it as `owner/name`"),
    # A proxy's log-in page, a wrong address.
    _Rule(
        (json.JSONDecodeError, errors.FileMetadataError, KeyError),
        "{endpoint} does not answer as a Hub does",
        "check the network and HF_ENDPOINT",
    ),
    _Rule(
        (_TRANSPORT_ERROR, ConnectionError, TimeoutError),
        "the connection to {endpoint} failed",
        "check the network",
        transient=True,
    ),
    # Xet transfers report nearly everything as RuntimeError; a file of the wrong length is a bare OSError.
    _Rule(
        (RuntimeError, *_if_known("XetDownloadError")),
        "the transfer of {file} broke off ({detail})",
        "check the network",
        transient=True,
    ),
    _Rule((OSError,), "{file} could not be transferred ({detail})", "check disk and network", transient=True),
    _Rule((ValueError,), "the Hub refused {file} ({detail})", "correct it"),
)
_DISK_FULL = _Rule((OSError,), "the disk is full while {file} is fetched", "free some space")
_KNOWN: tuple[type[Exception], ...] = tuple({kind for rule in _RULES for kind in rule.kinds})


def _cause(error: BaseException) -> BaseException:
    """The error that says what happened, where huggingface_hub wraps it into one that does not."""
    while isinstance(error, (errors.LocalEntryNotFoundError, RuntimeError)) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _rule(error: BaseException) -> _Rule | None:
    """The rule for an error that :func:`_cause` returned."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return _DISK_FULL
    for rule in _RULES:
        if isinstance(error, rule.kinds) and (rule.statuses is None or _status(error) in rule.statuses):
            return rule
    return None


def _detail(error: BaseException) -> str:
    """First line of an error's text, without anything that gives access (tokens, signed addresses)."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if token := os.environ.get("HF_TOKEN"):
        line = line.replace(token, "***")
    line = re.sub(r"hf_\w{8,}|eyJ[\w.-]{8,}", "***", line)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", line).rstrip(".")


@contextmanager
def _told(
    kind: type[SvdconvertError], repo: str, revision: str | None = None, file: str = "the file"
) -> Iterator[None]:
    """Turn every failure of huggingface_hub into one sentence.

    Args:
        kind: InputError while nothing has been done yet, JobError during transfers.
        repo: repository id.
        revision: what the user asked for.
        file: what is being transferred.

    Raises:
        SvdconvertError: of the given kind.
    """
    try:
        yield
    except _KNOWN as wrapped:
        error = _cause(wrapped)
        rule = _rule(error)
        if rule is None:
            raise
        endpoint = _endpoint()
        words = {
            "repo": repo,
            "revision": revision or constants.DEFAULT_REVISION,
            "file": file,
            "endpoint": endpoint,
            "page": f"{endpoint}/{repo}",
            "status": _status(error),
            "detail": _detail(error),
        }
        message = f"{rule.problem}; {rule.remedy}".format(**words)
        if kind is JobError:
            message += ", then the same command continues"
        raise kind(message) from None


def _retried(call: Callable[[], Result]) -> Result:
    """Run a transfer, and again if it broke off for a reason that may pass."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except _KNOWN as wrapped:
            rule = _rule(_cause(wrapped))
            if rule is None or not rule.transient:
                raise
            time.sleep(_PAUSE * attempt)
    return call()


def _endpoint() -> str:
    # Read at call time: huggingface_hub reads the variable only once, when it is imported.
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _api() -> HfApi:
    disable_progress_bars()  # they would run into the tool's own
    return HfApi(endpoint=_endpoint(), library_name="svdconvert")


class _Checkout:
    """The files of one commit of a repository, fetched when they are asked for.

    Attributes:
        where: how messages call it.
        commit: the commit's hash.
        sizes: bytes of every file, by path.
    """

    commit: str

    def __init__(self, repo: str, revision: str | None) -> None:
        self.repo = repo
        self.revision = revision
        self.where = repo if revision is None else f"{repo} (revision {revision})"
        self.api = _api()
        self.sizes = self._cached_files() if constants.HF_HUB_OFFLINE else self._listed_files()

    def _listed_files(self) -> dict[str, int]:
        """Pin the commit and ask for its files, name -> bytes."""
        with _told(InputError, self.repo, self.revision):
            info = self.api.model_info(self.repo, revision=self.revision, files_metadata=True, timeout=_TIMEOUT)
        if not info.sha:
            raise InputError(f"{self.where} has no commit; upload a model to it first")
        self.commit = info.sha
        return {f.rfilename: f.size or 0 for f in info.siblings or ()}

    def _cached_files(self) -> dict[str, int]:
        """Pin the commit and find its files in offline mode, name -> bytes."""
        config = try_to_load_from_cache(self.repo, "config.json", revision=self.revision)
        if not isinstance(config, str):
            raise InputError(
                f"HF_HUB_OFFLINE is set and {self.where} is not in the cache; "
                f"unset it, or fetch the model with `hf download {self.repo}` while there is a network"
            )
        snapshot = Path(config).parent
        self.commit = snapshot.name
        self.where = f"the cached copy of {self.where} (HF_HUB_OFFLINE is set)"
        found = ModelFolder(snapshot)
        found.check(read_names(found.sizes))
        return found.sizes

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
        """What becomes of the files that are no weights."""
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
            InputError: there is none, or the repository is something else than a model that transformers loads.
        """
        refuse_other_format(
            self.where,
            self.sizes,
            lambda name: self.json(name, f"{self.where} has no {name}"),
            has_weights=bool(stock_weights(self.sizes)),
        )
        return self.json("config.json", f"{self.where} has no config.json, so it is no model")

    def json(self, file: str, missing: str) -> dict[str, Any]:
        """A JSON object; ``missing`` is the message if there is none."""
        if file not in self.sizes:
            raise InputError(missing)
        return read_json(self.fetch(file, InputError), missing)

    def cached(self, file: str) -> Path | None:
        """A file of this commit in the Hugging Face cache."""
        found = try_to_load_from_cache(self.repo, file, revision=self.commit)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, file: str, kind: type[SvdconvertError], folder: Path | None = None) -> Path:
        """Bring a file here.

        Args:
            file: its name.
            kind: error to raise.
            folder: where to put it; None for the Hugging Face cache, where it is taken from in any case.
        """
        cached = self.cached(file)
        if cached is not None:
            return cached
        with _told(kind, self.repo, self.revision, file):
            return Path(
                _retried(
                    lambda: self.api.hf_hub_download(
                        self.repo, file, revision=self.commit, local_dir=folder, etag_timeout=_TIMEOUT
                    )
                )
            )


class HubSource(Source):
    """A checkpoint on the Hub, pinned to one commit.

    Attributes:
        revision: branch, tag or commit that was asked for.
        download_folder: where weight files are put while they are needed.
        download_bytes: size of every weight file that is not in the Hugging Face cache.
    """

    repo: str
    commit: str
    fetched = True

    def __init__(self, repo: str, revision: str | None = None, *, download_folder: Path | None) -> None:
        """Resolve the revision and read config, index and headers.

        Args:
            repo: ``owner/name``.
            revision: branch, tag or commit; None for the default branch.
            download_folder: where weight files are put, one at a time; None if only headers are needed.

        Raises:
            InputError: there is no such checkpoint, no access to it, or it cannot be used.
            JobError: pickled weights could not be downloaded.
        """
        self._checkout = _Checkout(repo, revision)
        self.name = self.repo = repo
        self.revision = revision
        self.commit = self._checkout.commit
        self.download_folder = download_folder
        self._where = self._checkout.where
        self._sizes = self._checkout.sizes
        self._local: dict[str, Path] = {}
        self._in_flight: set[str] = set()
        self._headers: dict[str, list[TensorInfo]] = {}
        self.config = self._checkout.config()
        check_type(self.config, self.name)
        self.files, self.pickled, index = self._checkout.weights()
        side = self._checkout.side_files(self.config, [*self.files, *filter(None, [index])])
        self.side_files = list(side.taken)
        self.download_bytes = {file: self._sizes[file] for file in self.files if not self._checkout.cached(file)}
        self._headers = self._pickled_headers() if self.pickled else self._safe_headers()
        self.tensors, self.stored, note = unwrap(merge_headers(self._headers), self.config)
        self.notes = (*filter(None, [note]), *side_notes(side, listing))

    def path(self, file: str) -> Path:
        """The local path of a file: in the Hugging Face cache if it is there, else downloaded now.

        Weight files go into the download folder, or into the cache if there is none; other files into the cache.

        Raises:
            JobError: it could not be fetched, or is not what its header on the Hub promised.
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
        # The next file may be on its way in another thread already.
        if not self._in_flight and not any((self.download_folder / other).exists() for other in self.files):
            # Nothing is under way any more, so what is left are notes and fragments of broken transfers.
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
        """Check a local file against the header that was planned with."""
        try:
            same = read_header(path, file) == self._headers[file]
        except InputError:
            same = False
        if same:
            return
        if self.download_folder is not None and path == (self.download_folder / file).resolve():
            self.release(file)
            raise JobError(
                f"{file} came from {self.repo} damaged or with another header than the Hub had shown, "
                "and was deleted; the same command fetches it again"
            )
        raise JobError(f"the cached file {path} is damaged; delete it, then the same command continues")

    def _safe_headers(self) -> dict[str, list[TensorInfo]]:
        """Headers of safetensors files, without the files."""
        with ThreadPoolExecutor(_HEADER_THREADS) as pool:
            return dict(zip(self.files, pool.map(self._safe_header, self.files), strict=True))

    def _safe_header(self, file: str) -> list[TensorInfo]:
        cached = self._checkout.cached(file)
        if cached is not None:
            try:
                return read_header(cached, file)
            except InputError as error:
                raise InputError(f"{error} (delete {cached} first)") from None
        with _told(InputError, self.repo, self.revision, file):
            raw = self._first_bytes(file)
        return parse_header(raw, file, self._sizes[file])

    def _first_bytes(self, file: str) -> bytes:
        """At least the header of a safetensors file on the Hub, in one range request or two."""
        url = hf_hub_url(self.repo, file, revision=self.commit, endpoint=self._checkout.api.endpoint)
        size = self._sizes[file]
        raw = self._range(url, 0, min(size, _HEADER_GUESS))
        if len(raw) >= 8:
            end = 8 + struct.unpack("<Q", raw[:8])[0]
            # A length beyond the file or the format's limit is refused by whoever parses it.
            if len(raw) < end <= min(size, 8 + MAX_HEADER_BYTES):
                raw += self._range(url, len(raw), end)
        return raw

    def _range(self, url: str, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        headers = build_hf_headers(library_name="svdconvert")
        # A compressed answer would ignore the range.
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        response = http_backoff("GET", url, headers=headers, timeout=_TIMEOUT, max_retries=2)
        hf_raise_for_status(response)
        body: bytes = response.content
        return body[start:end] if response.status_code == 200 else body

    def _pickled_headers(self) -> dict[str, list[TensorInfo]]:
        """Headers of pickles, which have to be here as a whole.

        Raises:
            InputError: there is no folder to download them into.
            JobError: they could not be downloaded.
        """
        from svdconvert.pickled import pickled_header

        if self.download_bytes and self.download_folder is None:
            at = "" if self.revision is None else f" --revision {self.revision}"
            raise InputError(
                f"{self._where} has its weights only as pickles ({listing(self.files)}), which cannot be looked into "
                f"from afar; run `hf download {self.repo}{at} --local-dir DIR` and give DIR"
            )
        if self.download_bytes:
            self._check_room()
            logger.warning(
                "%s has no safetensors; fetching %s (%.1f GB) as a whole",
                self.repo,
                listing(list(self.download_bytes)),
                sum(self.download_bytes.values()) / 1e9,
            )
        return {file: pickled_header(self.path(file)) for file in self.files}

    def _check_room(self) -> None:
        """Refuse a download that would fill the disk, before it begins.

        Raises:
            InputError: there is not enough space.
        """
        assert self.download_folder is not None
        folder = next(path for path in (self.download_folder, *self.download_folder.resolve().parents) if path.exists())
        here = [file for file in self.download_bytes if (self.download_folder / file).exists()]
        needed = sum(size for file, size in self.download_bytes.items() if file not in here)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{folder} has {free / 1e9:.1f} GB free, but the pickles of {self.repo} need {needed / 1e9:.1f} GB at "
                "once; free some space, or choose a folder on another disk"
            )


def download_model(repo: str, revision: str | None = None) -> Path:
    """Download a model into the Hugging Face cache: its weights in one format, and all that belongs to them.

    Args:
        repo: ``owner/name``.
        revision: branch, tag or commit; None for the default branch.

    Returns:
        The folder that holds it.

    Raises:
        InputError: there is no such model, or no access to it.
        JobError: the download broke off.
    """
    checkout = _Checkout(repo, revision)
    config = checkout.config()
    files, _, index = checkout.weights()
    code = [name for name in checkout.sizes if "/" not in name and name.endswith(".py")]
    others = {*code, "README.md", "svdconvert.json"} & checkout.sizes.keys()
    wanted = sorted({*checkout.side_files(config, [*files, *filter(None, [index])]).taken, *others})
    for file in (*wanted, *filter(None, [index]), *files):
        checkout.fetch(file, JobError)
    return checkout.fetch("config.json", JobError).parent


def check_push(repo: str, *, private: bool = False, revision: str | None = None) -> None:
    """Find out before any work whether the result can be pushed, and create what is missing.

    Args:
        repo: ``owner/name`` to push to; created if it does not exist.
        private: make a new repository private, and refuse an existing public one.
        revision: branch to push to; created if it does not exist.

    Raises:
        InputError: it cannot be pushed there.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise InputError(f"{repo!r} is no repository to push to; give it as `owner/name`")
    api = _api()
    with _told(InputError, repo, revision):
        account = api.whoami()
        if _role(account) == "read":
            raise InputError(
                f"the Hugging Face token of {account.get('name')} may only read; "
                f"make one that may write at {_endpoint()}/settings/tokens and set HF_TOKEN to it"
            )
        _ensure_repo(api, repo, private=private, revision=revision)


def push_folder(folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str) -> str:
    """Upload a finished folder; what is already there is not sent again.

    Args:
        folder: what to upload; its job folder and temporary files stay here.
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
    api = _api()
    with _told(JobError, repo, revision, str(folder)):
        _ensure_repo(api, repo, private=private, revision=revision)
        # Shards of an earlier upload under other names would be loaded by nobody and downloaded by everybody.
        stale = [
            name
            for name in api.list_repo_files(repo, revision=revision)
            if _OWN_WEIGHTS.fullmatch(name) and not (folder / name).exists()
        ]
        commit = _retried(
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
    """What a token may do, where the Hub says it: ``read``, ``write`` or ``fineGrained``."""
    token = (account.get("auth") or {}).get("accessToken") or {}
    return token.get("role")


def _ensure_repo(api: HfApi, repo: str, *, private: bool, revision: str | None) -> None:
    """Create repository and branch if need be, and check that they may be written to.

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
        timeout=_TIMEOUT,
    )
    if answer.status_code != 404:  # the repository exists by now, so 404 is a Hub that does not know the question
        hf_raise_for_status(answer)
    if private and not api.model_info(repo, timeout=_TIMEOUT).private:
        raise InputError(
            f"{repo} exists and is public; make it private at {_endpoint()}/{repo}/settings, or give another name"
        )
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)

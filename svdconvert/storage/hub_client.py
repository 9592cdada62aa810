"""Failures of the Hub and its client as one sentence each, and retries.

Works with huggingface_hub from 0.26 to 2.x, which use three different HTTP libraries.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import HfApi, constants, errors
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from svdconvert.errors import JobError, SvdconvertError

Result = TypeVar("Result")

# Seconds to wait for an answer.
TIMEOUT = 30.0
# On top of the retries inside huggingface_hub, which differ from version to version.
_ATTEMPTS = 3
_PAUSE = 1.0


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
    """How one kind of failure is reported.

    Attributes:
        kinds: exception classes.
        problem: what is wrong, a format string.
        remedy: what to do, a format string in the imperative.
        statuses: HTTP statuses the rule is limited to; None for errors without a response.
        transient: whether a retry may help.
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
    # Raised where there is no connection; also an EntryNotFoundError.
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
    _Rule((errors.HFValidationError,), "{repo!r} is not a valid repository name", "give it as `owner/name`"),
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
    """The original error, where huggingface_hub wraps it into one that says less."""
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
    """First line of an error's text, without secrets (tokens, signed addresses)."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if token := os.environ.get("HF_TOKEN"):
        line = line.replace(token, "***")
    line = re.sub(r"hf_\w{8,}|eyJ[\w.-]{8,}", "***", line)
    return re.sub(r"(https?://[^\s?]+)\?\S+", r"\1", line).rstrip(".")


@contextmanager
def hub_errors(
    kind: type[SvdconvertError], repo: str, revision: str | None = None, file: str = "the file"
) -> Iterator[None]:
    """Turn every failure of huggingface_hub into one sentence.

    Args:
        kind: InputError before any work, JobError during transfers.
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
        address = endpoint()
        words = {
            "repo": repo,
            "revision": revision or constants.DEFAULT_REVISION,
            "file": file,
            "endpoint": address,
            "page": f"{address}/{repo}",
            "status": _status(error),
            "detail": _detail(error),
        }
        message = f"{rule.problem}; {rule.remedy}".format(**words)
        if kind is JobError:
            message += ", then the same command continues"
        raise kind(message) from None


def retried(call: Callable[[], Result]) -> Result:
    """Run a transfer, and repeat it if it failed for a reason that may pass."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except _KNOWN as wrapped:
            rule = _rule(_cause(wrapped))
            if rule is None or not rule.transient:
                raise
            time.sleep(_PAUSE * attempt)
    return call()


def endpoint() -> str:
    """Address of the Hub."""
    # Read at call time: huggingface_hub reads the variable only once, when it is imported.
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def hub_api() -> HfApi:
    """The Hub, as the user has set it up."""
    disable_progress_bars()  # they would run into the program's own
    return HfApi(endpoint=endpoint(), library_name="svdconvert")

"""Regular expressions from files, matched in bounded time.

Python's own matcher has no bound: a few characters can keep it busy for ever. What has no repetition is matched here;
anything else in a process of its own that is ended when its time is up.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from svdconvert.errors import InputError

# For all names and patterns of a file together; what people write takes a millisecond.
MATCH_SECONDS = 10.0
MAX_PATTERN = 1000

# No repetition, no group: takes linear time.
_PLAIN = re.compile(r"(?:[\w.^$-]|\\[.\w-])*", re.ASCII)

_MATCHER = """
import json, re, sys
patterns, names = json.load(sys.stdin)
compiled = []
for pattern in patterns:
    try:
        compiled.append(re.compile(pattern))
    except Exception as error:
        json.dump([pattern, str(error)], sys.stdout)
        sys.exit()
json.dump([[bool(one.fullmatch(name)) for name in names] for one in compiled], sys.stdout)
"""


def matching(patterns: Sequence[str], names: Sequence[str], where: object) -> dict[str, str]:
    """Which pattern each name matches as a whole.

    Args:
        patterns: regular expressions; the first that matches counts.
        names: what they are matched with.
        where: what to call the file that they come from.

    Returns:
        Name -> pattern; a name that none matches is left out.

    Raises:
        InputError: a pattern is none, or matching takes too long.
    """
    found: dict[str, str] = {}
    for pattern, row in zip(patterns, _matches(patterns, names, where), strict=True):
        for name, matches in zip(names, row, strict=True):
            if matches:
                found.setdefault(name, pattern)
    return found


def _matches(patterns: Sequence[str], names: Sequence[str], where: object) -> list[list[bool]]:
    for pattern in patterns:
        if len(pattern) > MAX_PATTERN:
            raise InputError(f"{where} has a pattern of {len(pattern):,} characters ({pattern[:40]}...); shorten it")
    try:
        if all(_PLAIN.fullmatch(_inner(pattern)) for pattern in patterns):
            compiled = [re.compile(pattern) for pattern in patterns]
            return [[one.fullmatch(name) is not None for name in names] for one in compiled]
    except re.error as error:
        raise InputError(f"{where} has a pattern that is not a regular expression ({error}); correct it") from None
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            input=json.dumps([list(patterns), list(names)]).encode(),
            capture_output=True,
            timeout=MATCH_SECONDS,
            check=False,
        )
        answer: list[Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        raise InputError(
            f"{where} has patterns ({', '.join(map(_inner, patterns))[:60]}) that take more than {MATCH_SECONDS:g} s "
            "to match; write the names of the layers instead"
        ) from None
    except ValueError:
        raise InputError(f"{where} has a pattern that cannot be matched; write the layers' names") from None
    if answer and isinstance(answer[0], str):
        raise InputError(f"{where} has a pattern that is not a regular expression ({answer[1]}); correct it")
    return answer


def suffixed(pattern: str) -> str:
    """A pattern for the end of a module's path, from a dot on, as peft matches its own."""
    return rf"{_BEFORE}({pattern})"


# Takes linear time itself.
_BEFORE = r"(.*\.)?"


def _inner(pattern: str) -> str:
    return pattern[len(_BEFORE) + 1 : -1] if pattern.startswith(f"{_BEFORE}(") and pattern.endswith(")") else pattern

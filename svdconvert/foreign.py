"""Other people's code on the user's files: whatever it raises becomes one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from svdconvert.errors import InputError, SvdconvertError, out_of_memory

# Of these, the message alone says nothing: a key, an attribute, a number of arguments.
_BARE = (KeyError, AttributeError, IndexError, AssertionError, NameError, TypeError, ZeroDivisionError)


@contextmanager
def foreign_code(problem: str) -> Iterator[None]:
    """Context in which only transformers, tokenizers and the classes of models run, on what a user gave.

    They raise whatever comes up, for a config that makes no sense. The error's own place is not lost: it is the cause
    of the one that is raised, and SVDCONVERT_DEBUG=1 shows it.

    Args:
        problem: what cannot be done: ``config.json of X cannot be used``.

    Raises:
        InputError: anything went wrong but memory.
    """
    try:
        yield
    except (SvdconvertError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{problem}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an error says, in one line."""
    # transformers 5 wraps what is wrong with a field into a sentence that does not say it
    told = error.__cause__ if type(error).__name__.startswith("StrictDataclass") and error.__cause__ else error
    line = next((line.strip() for line in str(told).splitlines() if line.strip()), "")
    line = line if len(line) <= 300 else f"{line[:300]}..."
    return f"{type(told).__name__} {line}".rstrip() if isinstance(told, _BARE) or not line else line

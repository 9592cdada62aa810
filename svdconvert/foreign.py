"""Other libraries' code on the user's files: any exception becomes one sentence."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from svdconvert.errors import InputError, SvdconvertError, out_of_memory

CORRECT = "correct it, or update transformers if it is of a newer one"
CORRECT_CONFIG = "correct its config.json, or update transformers if it is of a newer one"
FETCH = "fetch its files again, or update transformers if they are of a newer one"

# Errors whose message alone says too little: a key, an attribute, a number of arguments.
_BARE = (KeyError, AttributeError, IndexError, AssertionError, NameError, TypeError, ZeroDivisionError)


@contextmanager
def foreign_code(problem: str, advice: str) -> Iterator[None]:
    """Context for calls of transformers, tokenizers and model classes on a user's files.

    For a config that makes no sense they may raise anything. The original error is the cause of the one that is raised,
    and SVDCONVERT_DEBUG=1 shows it.

    Args:
        problem: what cannot be done: ``config.json of X cannot be used``.
        advice: what to do about it, in the imperative.

    Raises:
        InputError: anything went wrong, except that memory ran out.
    """
    try:
        yield
    except (SvdconvertError, MemoryError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise InputError(f"{problem}: {reason(error).rstrip('.')}; {advice}") from error


def reason(error: BaseException) -> str:
    """An error's message in one line."""
    # transformers 5 wraps a field's error into a sentence that does not name the fault
    told = error.__cause__ if type(error).__name__.startswith("StrictDataclass") and error.__cause__ else error
    line = next((line.strip() for line in str(told).splitlines() if line.strip()), "")
    line = line if len(line) <= 300 else f"{line[:300]}..."
    return f"{type(told).__name__} {line}".rstrip() if isinstance(told, _BARE) or not line else line


class quiet_transformers:
    """Context in which transformers draws no progress bars and prints no load reports; ours say what matters."""

    def __enter__(self) -> None:
        """Silence it."""
        from transformers.utils import logging

        self._verbosity, self._bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        with warnings.catch_warnings():
            # Where HF_HUB_DISABLE_PROGRESS_BARS is set, huggingface_hub warns that it decides.
            warnings.simplefilter("ignore")
            logging.disable_progress_bar()

    def __exit__(self, *exception: object) -> None:
        """Let it speak as before."""
        from transformers.utils import logging

        logging.set_verbosity(self._verbosity)
        if self._bars:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logging.enable_progress_bar()

"""What Ctrl-C does to the program: it ends with one sentence, wherever it is, and the same command continues.

Python's own way, an exception between any two instructions of the main thread, breaks whatever is there: a thread that
is just starting, an import, a callback that swallows it. A job may be killed at any moment and continued, so the
program simply ends at once. Only where finished work would be lost, or a temporary folder left behind, it is asked to
stop instead (:func:`held`), and a second Ctrl-C ends it.

As a library nothing here acts: signals are those of the program that uses it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SENTENCE = "the job was interrupted; run the same command to continue"


class _State:
    installed = False
    held = 0
    asked = False


def install() -> None:
    """Let Ctrl-C do this from here on.

    A program that was started with SIGINT ignored, as a script's `&` does with what it puts into the background,
    keeps ignoring it: somebody else's Ctrl-C is not meant for it.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
        _State.installed = True


def settle() -> None:
    """Take no more notice of Ctrl-C: everything is done, and what is left is to say so."""
    if _State.installed:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _State.installed = False


def asked() -> bool:
    """Whether the program was asked to stop."""
    return _State.asked


def check() -> None:
    """Stop here, if the program was asked to. May be called from any thread.

    Raises:
        KeyboardInterrupt: it was.
    """
    if _State.asked:
        raise KeyboardInterrupt


@contextmanager
def held() -> Iterator[None]:
    """Where Ctrl-C is only noted, for :func:`check`; called in the main thread.

    Raises:
        KeyboardInterrupt: at the end, if it came meanwhile.
    """
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    check()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is gone at the end, Ctrl-C or not."""
    import tempfile  # this file is imported before Ctrl-C is taken care of

    with held(), tempfile.TemporaryDirectory(prefix="svdconvert-") as folder:
        yield Path(folder)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _State.held and not _State.asked:
        _State.asked = True
        return
    end()


def end() -> None:
    """Say the sentence and end the process, whatever its threads are doing."""
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(1, b"\x1b[?25h\r\n")  # a progress bar has hidden the cursor
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if not several or os.environ.get("RANK", "0") in ("", "0"):  # one speaks for all
        os.write(2, f"Error: {SENTENCE}\n".encode())
    os._exit(1)

"""Ctrl-C ends the program with one sentence, wherever it is, and the same command continues the work.

Python's own way, an exception between any two instructions of the main thread, can break a thread that is just
starting or an import, and a callback can swallow it. A job can be killed at any moment and continued, so the program
simply ends at once. Where finished work would be lost, or a temporary folder left behind, Ctrl-C only requests a stop
(:func:`held`), and a second one ends the program.

Nothing here acts when svdconvert is used as a library: signals belong to the program that uses it.
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
    lasting: list[tuple[int, Path]] = []  # noqa: RUF012 - the state of the one process


def install() -> None:
    """Handle Ctrl-C this way from now on.

    A program that was started with SIGINT ignored, as a script does with `&`, keeps ignoring it: that Ctrl-C is meant
    for somebody else.
    """
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
        _State.installed = True


def settle() -> None:
    """Ignore Ctrl-C from now on: the work is done, and only its report is left."""
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
    """Context in which Ctrl-C is only noted, for :func:`check`; for the main thread.

    Raises:
        KeyboardInterrupt: at the end, if Ctrl-C was pressed meanwhile.
    """
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    check()


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder that is removed at the end, also after Ctrl-C."""
    import tempfile  # this file is imported before Ctrl-C is handled

    with held(), tempfile.TemporaryDirectory(prefix="svdconvert-") as folder:
        yield Path(folder)


def lasting_folder() -> Path:
    """A folder that is removed when the process ends, also after Ctrl-C."""
    import atexit
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="svdconvert-"))
    if not _State.lasting:
        atexit.register(_remove_lasting)
    _State.lasting.append((os.getpid(), folder))
    return folder


def _remove_lasting() -> None:
    import shutil

    for process, folder in _State.lasting:
        if process == os.getpid():  # not those of the process that this one was forked from
            shutil.rmtree(folder, ignore_errors=True)


def _interrupted(number: int, frame: FrameType | None) -> None:
    if _State.held and not _State.asked:
        _State.asked = True
        return
    end()


def end() -> None:
    """Print the sentence and end the process, whatever its threads are doing."""
    if sys.__stdout__ is not None and sys.__stdout__.isatty():
        os.write(1, b"\x1b[?25h\r\n")  # a progress bar has hidden the cursor
    _remove_lasting()
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    if not several or os.environ.get("RANK", "0") in ("", "0"):  # one process speaks for all
        os.write(2, f"Error: {SENTENCE}\n".encode())
    os._exit(1)

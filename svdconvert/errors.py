"""The two ways a command can fail, and their exit codes.

Every message is one sentence: what is wrong with which file or tensor, and what to do about it.
"""

from __future__ import annotations


class SvdconvertError(Exception):
    """Base of all errors that are reported to the user without a traceback."""

    exit_code = 1


class InputError(SvdconvertError):
    """What was asked for cannot be done: a wrong path, rank, file or repository (exit code 2)."""

    exit_code = 2


class JobError(SvdconvertError):
    """The work broke off half-way; the same command continues it once the cause is gone (exit code 1)."""

    exit_code = 1

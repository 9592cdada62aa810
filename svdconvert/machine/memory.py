"""Memory of this machine, and of this process."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far."""
    try:
        # On Linux the value of getrusage starts with the peak of the parent process.
        with open("/proc/self/status", encoding="ascii") as handle:
            for line in handle:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Host memory that is available without swapping."""
    try:
        with open("/proc/meminfo", encoding="ascii") as handle:
            for line in handle:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def give_memory_back() -> None:
    """Return freed memory to the system, so that the next step does not have the last one's on top of its own.

    The C library keeps what lies between blocks in use. Only glibc can be asked; elsewhere nothing happens.
    """
    if sys.platform.startswith("linux"):
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)

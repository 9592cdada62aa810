"""The program `svdconvert`, as it is started. It imports nothing before Ctrl-C is taken care of."""

from __future__ import annotations

from svdconvert.machine import interrupts


def run() -> None:
    """Do what the command line says, and exit."""
    interrupts.install()
    from svdconvert.cli.app import main

    try:
        main()
    finally:
        interrupts.settle()

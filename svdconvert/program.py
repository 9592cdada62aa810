"""The program `svdconvert`, as it is started."""

from __future__ import annotations


def run() -> None:
    """Do what the command line says, and exit."""
    from svdconvert.cli import main

    main()

"""The command line: parses, calls the library, shows the result. No torch before a command needs it."""

from svdconvert.cli import measuring, results
from svdconvert.cli.converting import main

__all__ = ["main", "measuring", "results"]

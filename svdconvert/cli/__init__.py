"""The command line: parses, calls the library, shows the result. No torch before a command needs it."""

from svdconvert.cli import converting, measuring, results
from svdconvert.cli.program import main

__all__ = ["converting", "main", "measuring", "results"]

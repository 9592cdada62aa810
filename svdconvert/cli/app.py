"""The whole command line: the program, with the commands that register themselves in it."""

from svdconvert.cli import converting, measuring, results
from svdconvert.cli.program import main

__all__ = ["converting", "main", "measuring", "results"]

"""The whole command line: the program, with the commands that register themselves in it."""

from svdconvert.cli import (
    ablate,
    calibrate,
    convert,
    densify,
    evaluate,
    fold,
    heal,
    html_report,
    options,
    plan,
    push,
    spectrum,
    sweep,
    verify,
)
from svdconvert.cli.program import main

__all__ = [
    "ablate",
    "calibrate",
    "convert",
    "densify",
    "evaluate",
    "fold",
    "heal",
    "html_report",
    "main",
    "options",
    "plan",
    "push",
    "spectrum",
    "sweep",
    "verify",
]

"""Low-rank factorization of Hugging Face language models.

from svdconvert import convert, plan

print(plan("EleutherAI/polyglot-ko-3.8b", rank=768).params_after)
report = convert("EleutherAI/polyglot-ko-3.8b", "polyglot-ko-3.8b-r768", rank=768)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from svdconvert.version import __version__ as __version__

# Imported when they are first used: torch and transformers take seconds.
_EXPORTS = {
    "convert": "commands.convert",
    "plan": "commands.plan",
    "push": "commands.push",
    "report": "commands.html_report",
    "Report": "commands.report",
    "densify": "commands.densify",
    "evaluate": "commands.evaluate",
    "Evaluation": "commands.evaluate",
    "fold": "commands.fold",
    "heal": "commands.heal",
    "verify": "commands.verify",
    "Check": "commands.comparing",
    "Calibration": "calibration.knowledge",
    "ablate": "commands.ablate",
    "calibrate": "commands.calibrate",
    "spectrum": "commands.spectrum",
    "MatrixReport": "factoring.matrix_report",
    "MatrixSpectrum": "commands.spectra",
    "Spectra": "commands.spectra",
    "options": "commands.options",
    "Options": "commands.ways",
    "Way": "commands.ways",
    "sweep": "commands.sweep",
    "Sweep": "commands.sweep_book",
    "Plan": "planning.plan",
    "Outcome": "jobs.job",
    "Events": "planning.events",
    "SvdconvertError": "errors",
    "InputError": "errors",
    "JobError": "errors",
}

__all__ = [
    "Calibration",
    "Check",
    "Evaluation",
    "Events",
    "InputError",
    "JobError",
    "MatrixReport",
    "MatrixSpectrum",
    "Options",
    "Outcome",
    "Plan",
    "Report",
    "Spectra",
    "SvdconvertError",
    "Sweep",
    "Way",
    "ablate",
    "calibrate",
    "convert",
    "densify",
    "evaluate",
    "fold",
    "heal",
    "options",
    "plan",
    "push",
    "report",
    "spectrum",
    "sweep",
    "verify",
]

if TYPE_CHECKING:
    from svdconvert.calibration.knowledge import Calibration
    from svdconvert.commands.ablate import ablate
    from svdconvert.commands.calibrate import calibrate
    from svdconvert.commands.comparing import Check
    from svdconvert.commands.convert import convert
    from svdconvert.commands.densify import densify
    from svdconvert.commands.evaluate import Evaluation, evaluate
    from svdconvert.commands.fold import fold
    from svdconvert.commands.heal import heal
    from svdconvert.commands.html_report import report
    from svdconvert.commands.options import options
    from svdconvert.commands.plan import plan
    from svdconvert.commands.push import push
    from svdconvert.commands.report import Report
    from svdconvert.commands.spectra import MatrixSpectrum, Spectra
    from svdconvert.commands.spectrum import spectrum
    from svdconvert.commands.sweep import sweep
    from svdconvert.commands.sweep_book import Sweep
    from svdconvert.commands.verify import verify
    from svdconvert.commands.ways import Options, Way
    from svdconvert.errors import InputError, JobError, SvdconvertError
    from svdconvert.factoring.matrix_report import MatrixReport
    from svdconvert.jobs.job import Outcome
    from svdconvert.planning.events import Events
    from svdconvert.planning.plan import Plan


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'svdconvert' has no attribute {name!r}")
    value = getattr(import_module(f"svdconvert.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

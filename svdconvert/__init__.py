"""Low-rank factorization of Hugging Face language models.

from svdconvert import convert, plan

print(plan("EleutherAI/polyglot-ko-3.8b", rank=768).params_after)
report = convert("EleutherAI/polyglot-ko-3.8b", "polyglot-ko-3.8b-r768", rank=768)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read by pyproject.toml too: one place, and there without an installation.
__version__ = "0.2.0"

# Imported when they are first used: torch and transformers take seconds.
_EXPORTS = {
    "convert": "conversion",
    "plan": "conversion",
    "push": "conversion",
    "Report": "conversion",
    "densify": "densifying",
    "evaluate": "perplexity",
    "Evaluation": "perplexity",
    "fold": "folding",
    "verify": "verification",
    "Check": "comparing",
    "Calibration": "calibrating",
    "ablate": "ablation",
    "calibrate": "calibrating",
    "spectrum": "spectra",
    "MatrixSpectrum": "spectra",
    "Spectra": "spectra",
    "sweep": "sweeping",
    "Sweep": "sweep_book",
    "Plan": "planning",
    "Outcome": "job",
    "Events": "events",
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
    "MatrixSpectrum",
    "Outcome",
    "Plan",
    "Report",
    "Spectra",
    "SvdconvertError",
    "Sweep",
    "ablate",
    "calibrate",
    "convert",
    "densify",
    "evaluate",
    "fold",
    "plan",
    "push",
    "spectrum",
    "sweep",
    "verify",
]

if TYPE_CHECKING:
    from svdconvert.ablation import ablate
    from svdconvert.calibrating import Calibration, calibrate
    from svdconvert.comparing import Check
    from svdconvert.conversion import Report, convert, plan, push
    from svdconvert.densifying import densify
    from svdconvert.errors import InputError, JobError, SvdconvertError
    from svdconvert.events import Events
    from svdconvert.folding import fold
    from svdconvert.job import Outcome
    from svdconvert.perplexity import Evaluation, evaluate
    from svdconvert.planning import Plan
    from svdconvert.spectra import MatrixSpectrum, Spectra, spectrum
    from svdconvert.sweep_book import Sweep
    from svdconvert.sweeping import sweep
    from svdconvert.verification import verify


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'svdconvert' has no attribute {name!r}")
    value = getattr(import_module(f"svdconvert.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

"""What can be refused of the comparison of ranks with bits before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from svdconvert.calibration.presence import require_statistics
from svdconvert.errors import InputError
from svdconvert.models.windows import read_text, windows
from svdconvert.paths import user_path
from svdconvert.sentences import asked
from svdconvert.storage.source import read_config


def check_options(
    model: str | os.PathLike[str],
    *,
    given: bool,
    stats: str | os.PathLike[str] | None,
    measure: str | os.PathLike[str] | None,
    window: int | None,
) -> None:
    """Refuse what cannot be read, or a window that the model does not read.

    Args:
        model, stats, measure, window: see :func:`svdconvert.options`.
        given: whether a text is given.

    Raises:
        InputError: there is neither a text nor statistics, or one of these cannot be used.
    """
    if not given and stats is None:
        raise InputError(f"comparing ranks with bits needs a text; give one as {asked('calibration')}")
    if stats is not None:
        require_statistics(user_path(stats))
    if measure is not None:
        read_text(user_path(measure))
    folder = Path(model)
    if window is not None and (folder / "config.json").is_file():  # of others when they are open
        windows(read_config(folder), window, None, "disjoint")

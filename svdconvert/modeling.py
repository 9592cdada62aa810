"""The modeling files, where the package is run from its own checkout.

An installation has them as the package ``svdconvert/modeling``, which Python prefers to this file. In the repository
they lie beside the package, and this module stands for that folder, so that ``python -m svdconvert`` also works from
the repository's root.
"""

from pathlib import Path

__path__ = [str(Path(__file__).resolve().parent.parent / "modeling")]

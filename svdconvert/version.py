"""The version of this package, and of what a result depends on."""

from __future__ import annotations

import platform
from importlib import metadata

# Read by pyproject.toml too: one place, and there without an installation.
__version__ = "0.2.0"


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = ("torch", "safetensors", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "svdconvert": __version__,
        **{name: metadata.version(name) for name in packages},
    }

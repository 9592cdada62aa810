"""All measurements of docs/real.md, one after the other, each in a process of its own.

    pip install "svdconvert[gguf,harness]"
    python -m tests.benchmarks.real --texts wikitext2        # hours on two cores

Lines that docs/real.json already has are not measured again, except for the questions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.measure import ROOT

from .subjects import SUBJECTS

PARTS = ("losses", "answers", "law")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real")
    parser.add_argument("--texts", type=Path, required=True, help="folder with wiki.valid.tokens and wiki.test.tokens")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    for part in options.only:
        line = [sys.executable, "-m", f"tests.benchmarks.real.{part}"]
        if part != "law":  # which reads the files of others
            line += ["--texts", str(options.texts.resolve()), "--subjects", *options.subjects]
        subprocess.run(line, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()

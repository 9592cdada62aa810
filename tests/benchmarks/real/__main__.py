"""All measurements of docs/real.md, one after the other, each in a process of its own.

    pip install "svdconvert[gguf,harness]"
    python -m tests.benchmarks.real --texts data/wikitext2        # hours on two cores

Lines that docs/real.json already has are not measured again, except for the questions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.measure import ROOT

from .subjects import SUBJECTS

PARTS = ("losses", "answers", "texts", "law")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real")
    parser.add_argument("--texts", type=Path, required=True, help="folder with wiki.valid.tokens and wiki.test.tokens")
    parser.add_argument("--data", type=Path, help="folder of all texts; default: the one with the folder of --texts")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    for part in options.only:
        line = [sys.executable, "-m", f"tests.benchmarks.real.{part}"]
        if part == "texts":  # which measures the bundled model too
            data = options.data or options.texts.resolve().parent
            line += ["--data", str(data.resolve()), "--subjects", *options.subjects, "tiny-polyglot"]
        elif part != "law":  # which reads the files of others
            line += ["--texts", str(options.texts.resolve()), "--subjects", *options.subjects]
        subprocess.run(line, cwd=ROOT, check=True)


if __name__ == "__main__":
    main()

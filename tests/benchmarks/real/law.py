"""Predicted against measured loss of a small model at five budgets, beside those of the real ones.

    python -m tests.benchmarks.real.law

The real subjects have their lines in the table of losses. The bundled GPT-NeoX is measured here, on its own texts. What
counts is the loss on held-out text: KL from the dense model, and log-perplexity added.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from svdconvert import Calibration, convert, evaluate
from tests.benchmarks.harness import BUNDLED

from . import book
from .rows import LAW, LAW_KEEPS

SMALL = "bundled GPT-NeoX"


def small(windows: int) -> list[dict[str, Any]]:
    """The lines of the bundled model, calibrated as docs/quality.md has it.

    Args:
        windows: of 256 tokens, from the beginning of its held-out text; about 560 bytes each.
    """
    text = Calibration(str(BUNDLED / "calibration.txt"), samples=256, length=256, batch_size=16)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        held_out = (BUNDLED / "heldout.txt").read_text(encoding="utf-8")
        (folder / "text.txt").write_text(held_out[: 230 * windows], encoding="utf-8")
        for keep in LAW_KEEPS:
            report = convert(
                BUNDLED / "model", folder / "out", keep=keep, method=LAW.method, allocation=LAW.allocation,
                layout=LAW.layout, calibration=text, work=folder / "work", device="cpu", check=False, overwrite=True,
            )  # fmt: skip
            found = evaluate(
                folder / "out", folder / "text.txt", protocol="disjoint", window=256, against=BUNDLED / "model",
                device="cpu",
            )  # fmt: skip
            assert found.divergence is not None
            lines.append(
                {"subject": SMALL, "name": LAW.name, "keep": keep, "calibration_tokens": 65_536, "tokens": found.tokens}
                | {"predicted": report.outcome.record["predicted_loss"]}
                | {"kl": found.divergence.kl, "added": found.divergence.added}
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.law")
    parser.add_argument("--windows", type=int, default=64, help="of 256 tokens")
    parser.add_argument("--out", type=Path, default=book.OUT, help="file name without its ending")
    options = parser.parse_args()
    lines = small(options.windows)
    book.write(options.out, book.read(options.out) | {"law": lines})


if __name__ == "__main__":
    main()

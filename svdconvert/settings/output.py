"""What is written."""

from __future__ import annotations

from dataclasses import dataclass

from svdconvert.settings.row import PLACE, option
from svdconvert.words import parse_size, size_text

DTYPES = ("keep", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Output:
    """The files of the result.

    Attributes:
        dtype: ``keep`` or the torch name of the type that every tensor gets.
        max_shard_bytes: limit of a weight file.
        overwrite: whether to replace what the folder holds.
        check: whether to check the result and measure its loss.
        report: whether to write a page about the result.
    """

    dtype: str = option(
        "keep",
        "--dtype",
        "Type of the stored weights.",
        keyword="dtype",
        group="Output",
        kind="choice",
        words=DTYPES,
    )
    max_shard_bytes: int = option(
        5_000_000_000,
        "--max-shard-size",
        "Largest weight file to write: 500MB or 5GB in powers of 1000, 2GiB in powers of 1024, or a number of bytes.",
        keyword="max_shard_size",
        group="Output",
        metavar="SIZE",
        read=parse_size,
        write=lambda size: [size_text(size)],
    )
    overwrite: bool = option(
        False,
        "--overwrite",
        "Replace what svdconvert has written there; other files stay.",
        keyword="overwrite",
        group="Output",
        kind="flag",
        omitted_because=PLACE,
    )
    check: bool = option(
        True,
        "--no-check",
        "Leave out the check of the result, keys, shapes and logits, and the measuring of the loss added.",
        keyword="check",
        group="Output",
        kind="flag",
        omitted_because="whether the result is looked at, and its loss measured",
    )
    report: bool = option(
        False,
        "--report",
        "Also write report.html, a page about the result: ranks, losses, sizes and times.",
        keyword="report",
        group="Output",
        kind="flag",
        omitted_because="a page that is made from the record, at any time",
    )

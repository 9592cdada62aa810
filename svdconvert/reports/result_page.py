"""The page of a result."""

from __future__ import annotations

from svdconvert.jobs.record import RECORD, Record
from svdconvert.reports.bits import bits_section
from svdconvert.reports.document import document
from svdconvert.reports.facts import Facts
from svdconvert.reports.grid import Grid
from svdconvert.reports.losses import lost_section, measured_section
from svdconvert.reports.making import making_section
from svdconvert.reports.matrices import matrix_section
from svdconvert.reports.overview import advice, header, title
from svdconvert.reports.ranks import rank_section
from svdconvert.reports.sizes import size_section
from svdconvert.reports.times import time_section


def result_page(record: Record, where: object) -> bytes:
    """A page about a result, in HTML; the same for the same record.

    What a record of an earlier version does not have is left out.

    Args:
        record: its svdconvert.json.
        where: that file, for messages.

    Raises:
        InputError: a field of the record is of another kind than it should be.
    """
    facts = Facts.of(record, where)
    grid = Grid.of(facts)
    return document(
        title(facts),
        [
            header(facts),
            advice(facts),
            measured_section(facts),
            rank_section(facts, grid),
            bits_section(facts, grid),
            lost_section(facts, grid),
            size_section(facts),
            time_section(facts),
            making_section(facts),
            matrix_section(facts),
        ],
        made_of=RECORD,
    )

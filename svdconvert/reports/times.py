"""Where the time went."""

from __future__ import annotations

from collections.abc import Sequence

from svdconvert.reports import figures
from svdconvert.reports.facts import Facts
from svdconvert.reports.markup import Child, Markup, element
from svdconvert.reports.tables import bar, hidden, scrolling, section, simple_table

# A launcher has started as many processes; more are in the record.
_MOST_PROCESSES = 64


def time_section(facts: Facts) -> Markup | None:
    """A table of stages; None where there are none."""
    processes = facts.record.timing[:_MOST_PROCESSES]
    longest = max((time.wall_seconds for stages in processes for time in stages.values()), default=0.0)
    if longest <= 0:
        return None
    rows: list[Sequence[Child]] = []
    for number, stages in enumerate(processes):
        for stage, time in stages.items():
            name = stage if len(processes) == 1 else f"{stage}, process {number}"
            workers = "" if time.workers is None else str(time.workers)
            times = [figures.duration(max(seconds, 0.0)) for seconds in (time.wall_seconds, time.cpu_seconds)]
            rows.append((name, bar(time.wall_seconds / longest, kind="time"), *times, workers))
    cpu = sum(max(time.cpu_seconds, 0.0) for stages in processes for time in stages.values())
    rows.append(("together", element("td"), "", figures.duration(cpu), ""))
    caption = "Seconds of work in each stage"
    heads = ("stage", hidden("bars"), "work", "CPU", "workers")
    note = (
        "Stages run side by side, and waiting for each other does not count; so they add up to another number than the "
        "time that passed. An interrupted conversion has the times of the run that finished it."
    )
    table = scrolling(caption, simple_table(caption, heads, rows, aligned="ttnnn"))
    return section("time", "Time", table, element("p", note, class_="note"))

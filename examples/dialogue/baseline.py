"""Answers that need no model, to hold scores against: `python -m examples.dialogue.baseline grounding --data FILE`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import click

from examples.dialogue.commands import SETTINGS, Command
from examples.dialogue.schema import Sample, read_jsonl, write_lines
from svdconvert.errors import InputError


def _grounding(sample: Sample) -> str:
    if sample.grounding is None:
        raise InputError(f"sample {sample.id} has no grounding span to copy; choose another baseline")
    return sample.passage[slice(*sample.grounding)].strip()


# What is copied; a new baseline is a row.
BASELINES: Mapping[str, Callable[[Sample], str]] = {
    "grounding": _grounding,
    "passage": lambda sample: sample.passage.strip(),
    "question": lambda sample: sample.question.strip(),
}


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("what", type=click.Choice(list(BASELINES)))
@click.option("--data", type=click.Path(path_type=Path), required=True, help="Samples, as `prepare` writes them.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Predictions to write (.jsonl).")
def main(what: str, data: Path, out: Path) -> None:
    """Write predictions that copy the grounding, the passage or the question of each sample."""
    samples, report = read_jsonl(data)
    if report.dropped:
        click.echo(str(report), err=True)
    rows = [{"id": sample.id, "prediction": BASELINES[what](sample)} for sample in samples]
    count = write_lines(out, [{"settings": {"baseline": what}}, *rows]) - 1
    click.echo(f"{out}: {count:,} answers")


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.baseline")

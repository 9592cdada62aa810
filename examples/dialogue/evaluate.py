"""Scores of generated answers: `python -m examples.dialogue.evaluate PREDICTIONS... --data FILE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from examples.dialogue.commands import SETTINGS, Command
from examples.dialogue.evaluation import PROFILES, TOTAL, Scores, evaluate
from examples.dialogue.predictions import pair, read_predictions
from examples.dialogue.schema import read_jsonl, write_lines
from examples.dialogue.tokenizers import TOKENIZERS

_PATH = click.Path(path_type=Path)


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("predictions", type=_PATH, nargs=-1, required=True)
@click.option("--data", type=_PATH, required=True, help="Samples whose answers are the references.")
@click.option("--profile", type=click.Choice(list(PROFILES)), default="ko", show_default=True)
@click.option("--tokenizer", type=click.Choice(list(TOKENIZERS)), help="Of METEOR, ROUGE-L and rates in ko.  [kiwi]")
@click.option("--partial", is_flag=True, help="Leave out samples without a prediction.")
@click.option("--out", type=_PATH, help="Also write the scores as JSONL, one file of predictions a line.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON on standard output.")
def main(
    predictions: tuple[Path, ...],
    data: Path,
    profile: str,
    tokenizer: str | None,
    partial: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score PREDICTIONS, one or several files, against the answers of the samples in DATA.

    Scores are times 100; the signatures under the table say how each was counted. Figures of different signatures
    cannot be compared.
    """
    samples, report = read_jsonl(data)
    if report.dropped:
        click.echo(str(report), err=True)
    results = {}
    for path in predictions:
        _, answers = read_predictions(path)
        results[str(path)] = evaluate(*pair(answers, samples, partial=partial), profile, tokenizer=tokenizer)
    rows = [{"predictions": Path(path).name, **scores.to_json()} for path, scores in results.items()]
    if out is not None:
        write_lines(out, rows)
    if as_json:
        click.echo(json.dumps(rows, indent=2, ensure_ascii=False))
    else:
        _show(results)


def _show(results: dict[str, Scores]) -> None:
    from rich.console import Console
    from rich.table import Table

    # Without a terminal nobody wraps lines: give tables the room they need.
    console = Console(width=None if sys.stdout.isatty() else 160)
    first = next(iter(results.values()))
    further = [name for name in first.scores if name not in TOTAL]
    table = Table("predictions", "pairs", *TOTAL, "Total", *further, *first.rates)
    for column in table.columns[1:]:
        column.justify = "right"
    for path, scores in results.items():
        values = [*(scores.scores[name] for name in TOTAL), scores.total]
        values += [*(scores.scores[name] for name in further), *scores.rates.values()]
        table.add_row(Path(path).stem, f"{scores.pairs:,}", *(f"{value:.2f}" for value in values))
    console.print(table)
    console.print(f"profile {first.profile}; Total is F1 + METEOR + ROUGE-L + SacreBLEU", highlight=False)
    for name, signature in first.signatures.items():
        console.print(f"  {name}: {signature}", highlight=False, soft_wrap=True)
    console.print(f"  rates: tok:{first.rates_tokenizer}", highlight=False)


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.evaluate")

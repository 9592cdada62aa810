"""Raw data to train.jsonl and validation.jsonl: `python -m examples.dialogue.prepare SOURCE --out DIR`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from examples.dialogue.commands import SETTINGS, Command
from examples.dialogue.filters import GROUPS, Limits, keep_apart, shape, split
from examples.dialogue.loading import load, load_documents, published_files
from examples.dialogue.schema import Report, Sample, write_jsonl, write_whole
from examples.dialogue.templates import PASSAGES, TEMPLATES
from svdconvert.errors import InputError

_PATH = click.Path(path_type=Path)


def prepare(
    source: Path,
    out: Path,
    *,
    documents: Path | None = None,
    validation_source: Path | None = None,
    fraction: float = 0.1,
    seed: int = 0,
    by: str = "dialogue",
    passage: str | None = None,
    template: str = "kodoc2dial",
    limits: Limits | None = None,
    tokenizer: Path | None = None,
    language: str = "",
) -> tuple[dict[str, list[Sample]], dict[str, Report]]:
    """Load, shape, split and write.

    Args:
        source: a file of samples (.jsonl) or dialogues (.json), or a folder with the published names.
        out: folder for train.jsonl, validation.jsonl and prepare.json.
        documents: of the dialogues.
        validation_source: where validation data is a file of its own; the split is not made then.
        fraction, seed, by: of the split, see :func:`examples.dialogue.filters.split`.
        passage, template, limits: see :func:`examples.dialogue.filters.shape`; the passage is the section by default
            where the source is dialogues and documents, and stays as it is where it is samples.
        tokenizer: model folder to count tokens with.
        language: of samples that do not say it themselves.

    Returns:
        Samples and reports, by source: the written samples under ``train`` and ``validation``.

    Raises:
        InputError: something cannot be read or nothing is left.
    """
    if source.is_dir():
        source, found_validation, found_documents = published_files(source)
        validation_source, documents = validation_source or found_validation, documents or found_documents
    known = None if documents is None else load_documents(documents)
    counter = None
    if tokenizer is not None:
        from svdconvert.models.tokenizer import load_tokenizer

        counter = load_tokenizer(tokenizer)
    passage = passage or ("document" if source.suffix == ".jsonl" else "section")
    settings: dict[str, Any] = {"passage": passage, "template": template, "limits": limits or Limits()}
    reports: dict[str, Report] = {}

    def side(name: str, path: Path) -> list[Sample]:
        samples, report = load(path, known, language)
        reports[name] = report
        kept = shape(samples, report, tokenizer=counter, **settings)
        if not kept:
            counted = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.most_common())
            raise InputError(f"{path} has no sample left (dropped: {counted}); loosen the limits")
        return kept

    if validation_source is None:
        training, validation = split(side("source", source), fraction, seed=seed, by=by)
    else:
        validation = side("validation", validation_source)
        training = keep_apart(side("train", source), validation, reports["train"])
        if not training:
            raise InputError(f"every dialogue of {source} is in {validation_source} too; give different data")
    write_jsonl(out / "train.jsonl", training)
    write_jsonl(out / "validation.jsonl", validation)
    record = {
        "settings": {
            "source": source.name,
            "documents": None if documents is None else documents.name,
            "validation_source": None if validation_source is None else validation_source.name,
            "fraction": fraction if validation_source is None else None,
            "seed": seed if validation_source is None else None,
            "split_by": by if validation_source is None else None,
            "passage": passage,
            "template": template,
            "limits": vars(limits or Limits()),
            "tokenizer": None if tokenizer is None else tokenizer.name,
        },
        "reports": {name: report.to_json() for name, report in reports.items()},
        "written": {"train": _counts(training), "validation": _counts(validation)},
    }
    write_whole(out / "prepare.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    return {"train": training, "validation": validation}, reports


def _counts(samples: list[Sample]) -> dict[str, Any]:
    domains = sorted({sample.domain for sample in samples})
    return {
        "samples": len(samples),
        "dialogues": len({sample.dialogue_id for sample in samples}),
        "documents": len({sample.doc_id for sample in samples if sample.doc_id}),
        "domains": {domain: sum(sample.domain == domain for sample in samples) for domain in domains},
    }


@click.command(cls=Command, context_settings=SETTINGS)
@click.argument("source", type=_PATH)
@click.option("--out", type=_PATH, required=True, help="Folder for train.jsonl, validation.jsonl and prepare.json.")
@click.option("--documents", type=_PATH, help="Documents of the dialogues; without them samples have no passage.")
@click.option("--validation", "validation_source", type=_PATH, help="Validation data, where it is a file of its own.")
@click.option("--fraction", type=float, default=0.1, show_default=True, help="Otherwise: share of it in the dialogues.")
@click.option("--seed", type=int, default=0, show_default=True, help="Chooses the validation dialogues.")
@click.option("--split-by", "by", type=click.Choice(GROUPS), default="dialogue", show_default=True)
@click.option("--passage", type=click.Choice(PASSAGES), help="Part of the document.  [section; of samples, all]")
@click.option("--template", type=click.Choice(list(TEMPLATES)), default="kodoc2dial", show_default=True)
@click.option("--tokenizer", type=_PATH, help="Model folder to count tokens with.")
@click.option("--max-tokens", "total", type=click.IntRange(1), help="Longest prompt and answer together.")
@click.option("--max-answer-tokens", "answer", type=click.IntRange(1), help="Longest answer.")
@click.option("--max-passage-tokens", "passage_tokens", type=click.IntRange(1), help="Longest passage.")
@click.option("--max-turns", "turns", type=click.IntRange(0), help="Turns of the history to keep, the latest ones.")
@click.option("--language", default="", help="Of samples that do not say it themselves: ko, en.")
def main(
    source: Path, out: Path, total: int | None, answer: int | None, passage_tokens: int | None, turns: int | None,
    **options: Any,
) -> None:  # fmt: skip
    """Turn SOURCE into training and validation samples, kept apart by dialogue.

    SOURCE is a .jsonl file of samples, a .json file of Doc2Dial or MultiDoc2Dial dialogues, or a folder with the files
    that these data sets are published as. What is dropped is counted by reason; the longest answers cost most memory
    in training, so give limits.
    """
    limits = Limits(total=total, answer=answer, passage=passage_tokens, turns=turns)
    samples, reports = prepare(source, out, limits=limits, **options)
    for report in reports.values():
        click.echo(str(report))
    for name, side in samples.items():
        counts = _counts(side)
        click.echo(
            f"{out / name}.jsonl: {counts['samples']:,} samples of {counts['dialogues']:,} dialogues, "
            f"{counts['documents']:,} documents"
        )


if __name__ == "__main__":
    main(prog_name="python -m examples.dialogue.prepare")

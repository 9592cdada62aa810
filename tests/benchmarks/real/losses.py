"""Added log-perplexity, KL and agreement of every row, on WikiText-2 as the literature reads it.

    python -m tests.benchmarks.real.losses --texts wikitext2
    python -m tests.benchmarks.real.losses --texts wikitext2 --subjects smollm2-135m --only "kfac, global" --keep 0.8

``--texts`` is a folder with wiki.valid.tokens and wiki.test.tokens of WikiText-2. Calibration is on the former: the
statistics are collected once for a subject, and a method's decompositions are kept, so another budget costs little. The
test text is cut into disjoint windows of 2,048 tokens, of which the first are read. Rows go into the JSON file one by
one: those that are there are not measured again unless ``--again`` says so.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from svdconvert import Calibration, Report, calibrate, convert
from svdconvert.methods.table import METHODS
from svdconvert.models.divergence import Likelihoods, likelihoods
from svdconvert.models.loading import load_model
from svdconvert.models.passages import Passage, read_passage
from svdconvert.models.tokenizer import load_tokenizer, opening_token
from svdconvert.storage.source import read_config
from svdconvert.version import __version__
from tests.benchmarks.quality import Row

from . import book
from .rows import KEEPS, LAW, LAW_KEEPS, ROWS
from .subjects import FOLDER, SUBJECTS, Subject, digest, model

LENGTH = 512  # tokens of a calibration sequence
WINDOW = 2048


@dataclass(frozen=True)
class Readout:
    """The model's logits, as transformers' outputs have them."""

    logits: Tensor


class Remembered(nn.Module):
    """A model whose last hidden states are computed once and kept: for every further row it costs its head alone."""

    def __init__(self, dense: Any, folder: Path) -> None:
        """Keep the model.

        Args:
            dense: of a family whose logits are its head's output, as those of the subjects are.
            folder: keeps the states, a file for every batch.
        """
        super().__init__()
        self.dense, self.folder = dense, folder
        folder.mkdir(parents=True, exist_ok=True)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Readout:
        """Logits [batch, length, vocabulary]."""
        file = self.folder / f"{hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()}.safetensors"
        if not file.is_file():
            hidden = self.dense.base_model(input_ids, use_cache=use_cache).last_hidden_state
            save_file({"hidden": hidden.contiguous()}, file)
        return Readout(self.dense.get_output_embeddings()(load_file(file)["hidden"]))


def opened(ids: Tensor, opening: int | None, windows: int, window: int = WINDOW) -> Tensor:
    """The first windows of a text, each with the token that opens it; models that are used to it are lost without.

    Args:
        ids: [N], as the tokenizer gives them.
        opening: that token, or None.
        windows: how many.
        window: tokens of each.

    Returns:
        [windows * window].
    """
    if opening is None or int(ids[0]) != opening:  # the tokenizer puts none there
        return ids[: windows * window]
    each = ids[1 : 1 + windows * (window - 1)].view(windows, window - 1)
    return torch.cat([torch.full((windows, 1), opening), each], 1).flatten()


class Bench:
    """A subject, its calibration and its test text."""

    def __init__(self, subject: Subject, folder: Path, texts: Path, samples: int, windows: int) -> None:
        """Make the model and read the text.

        Args:
            subject: the model.
            folder: keeps models, statistics and decompositions.
            texts: of WikiText-2.
            samples: calibration sequences.
            windows: of the test text, from its beginning.
        """
        self.subject = subject
        self.validation, self.test = texts / "wiki.valid.tokens", texts / "wiki.test.tokens"
        self.model = model(subject, folder)
        self.work = folder / f"{subject.name}.work" / f"{samples * LENGTH // 1024}k"
        self.work.mkdir(parents=True, exist_ok=True)
        valid = shutil.copyfile(self.validation, self.work / "wiki.valid.txt")
        self.calibration = Calibration(str(valid), samples=samples, length=LENGTH)
        read = read_passage(self.model, read_config(self.model), self.test, WINDOW, None, "disjoint")
        self.passage: Passage = replace(read, ids=opened(read.ids, opening_token(load_tokenizer(self.model)), windows))
        # what a line holds for, beside its row, budget and calibration
        self.on = {
            "tokens": self.passage.tokens, "version": __version__,
            "validation_sha256": digest(self.validation), "test_sha256": digest(self.test),
        }  # fmt: skip
        self.reference = Remembered(
            load_model(self.model, "cpu", torch.float32), folder / f"{subject.name}.work" / "hidden"
        )

    def statistics(self, labels: str) -> Path:
        """Statistics for all methods, collected where they are not there yet; an interrupted run goes on."""
        folder = self.work / f"stats-{labels}"
        calibrate(
            self.model, replace(self.calibration, labels=labels), folder, methods=("kfac", "whiten"), device="cpu"
        )
        return folder

    def convert(self, row: Row, keep: float, out: Path) -> Report:
        """A factored model, by way of what is kept."""
        stats = self.statistics(row.labels) if METHODS[row.method].statistics else None
        return convert(
            self.model, out, keep=keep, method=row.method, allocation=row.allocation, layout=row.layout,
            refit=row.refit, shrinkage=row.shrinkage, stats=stats, work=self.work / row.work if stats else None,
            device="cpu", check=False,
        )  # fmt: skip

    def measured(self, row: Row, keep: float, out: Path) -> dict[str, Any]:
        """One line of the table; leaves no model."""
        began = _cpu_seconds()
        report = self.convert(row, keep, out)
        converted = _cpu_seconds() - began
        found = self.likelihood(out)
        shutil.rmtree(out)
        assert found.divergence is not None
        return {
            "subject": self.subject.name, "keep": keep, **asdict(row),
            "calibration_tokens": self.calibration.samples * LENGTH if METHODS[row.method].statistics else 0,
            **self.on, "params": report.plan.params_after,
            "params_before": report.plan.params_before, **asdict(found.divergence),
            "predicted": report.outcome.record.get("predicted_loss"), "cpu_s": round(converted, 1),
        }  # fmt: skip

    def likelihood(self, folder: Path) -> Likelihoods:
        """The test text under a model, against the dense one."""
        return likelihoods(load_model(folder, "cpu", torch.float32), self.passage, reference=self.reference)


def _cpu_seconds() -> float:
    """Of this process and its children so far."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def run(options: argparse.Namespace) -> None:
    """Measure the rows that are asked for and not there yet."""
    rows = [row for row in ROWS if not options.only or row.name in options.only]
    if unknown := set(options.only) - {row.name for row in rows}:
        raise SystemExit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(row.name for row in ROWS)}")
    for name in options.subjects:
        subject = SUBJECTS[name]
        samples = options.samples or subject.calibration
        bench = Bench(subject, options.folder, options.texts, samples, options.windows or subject.windows)
        for row in rows:
            for keep in options.keep or (LAW_KEEPS if row is LAW else KEEPS):
                found = book.read(options.out)
                known = book.there(found["losses"], name, row.name, keep, samples * LENGTH, bench.on)
                if known and not options.again:
                    continue
                with tempfile.TemporaryDirectory() as temporary:
                    line = bench.measured(row, keep, Path(temporary) / "out")
                print(line, flush=True)
                book.add(options.out, subject, line)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What all that measures the subjects takes."""
    parser.add_argument("--texts", type=Path, required=True, help="folder with wiki.valid.tokens and wiki.test.tokens")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps models, statistics and decompositions")
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--samples", type=int, help=f"calibration sequences of {LENGTH} tokens")
    parser.add_argument("--out", type=Path, default=book.OUT, help="file name without its ending")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.losses")
    add_options(parser)
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="names of rows; default all")
    parser.add_argument("--keep", type=float, nargs="+", default=[], help="default: as the rows say")
    parser.add_argument("--windows", type=int, help=f"windows of {WINDOW} tokens of the test text, from its beginning")
    parser.add_argument("--again", action="store_true", help="also rows that are there")
    run(parser.parse_args())


if __name__ == "__main__":
    main()

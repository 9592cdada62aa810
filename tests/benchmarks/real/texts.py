"""What to calibrate with: KL and added log-perplexity on texts of several kinds, by the text a model is calibrated on.

    python -m tests.benchmarks.real.texts --data data
    python -m tests.benchmarks.real.texts --data data --subjects tiny-polyglot --only Korean --keep 0.8

``--data`` is a folder with the texts that ``corpora`` reads. All calibration texts of a subject have the same number of
tokens, whole sequences of 512; a mixed one has about as many of each of its sources. Test texts are held out, sequences
of 512 as well. Every sequence begins as the model's texts do, and all but its first token is predicted. For the bundled
model there is also what more tokens of one text bring. A text's statistics and decompositions are kept, so another
budget costs little. Lines go into the JSON file one by one: those that are there are not measured again unless
``--again`` says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from svdconvert import Calibration, Report, calibrate, convert
from svdconvert.calibration.folder import StatisticsFolder
from svdconvert.calibration.text import sample_tokens
from svdconvert.models.divergence import likelihoods
from svdconvert.models.loading import load_model
from svdconvert.models.passages import Passage
from svdconvert.models.tokenizer import load_tokenizer, opening_token
from svdconvert.settings.text import SELF
from svdconvert.version import __version__
from tests.benchmarks.harness import BUNDLED

from . import book
from .corpora import CORPORA, Parts, mixed
from .losses import LENGTH, Remembered
from .rows import KEEPS, LAW, Row
from .subjects import FOLDER, SUBJECTS, model

WINDOWS = 4  # sequences of a test text
_BUNDLED_WINDOWS = 40


@dataclass(frozen=True)
class Trial:
    """What a subject is calibrated and tested on.

    Attributes:
        calibrations: name of a text -> its sources, in equal parts; none: what the model writes itself.
        samples: sequences of each.
        tests: sources.
        windows: sequences of each, if it has so many.
        more: text -> other numbers of sequences.
    """

    calibrations: Mapping[str, tuple[str, ...]]
    samples: int
    tests: tuple[str, ...]
    windows: int = WINDOWS
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


# Nobody is calibrated on the synopses and the stories: they are texts of a known language and an unknown kind.
TRIALS: Mapping[str, Trial] = {
    "gemma3-270m": Trial(
        {
            "Korean": ("reviews",),
            "English": ("wikitext",),
            "dialogue": ("manual2dial", "doc2dial"),
            "mixed": ("reviews", "wikitext", "manual2dial", "doc2dial"),
            "self": (),
        },
        samples=24,
        tests=("reviews", "synopses", "manual2dial", "wikitext", "tinystories", "doc2dial"),
    ),
    "smollm2-135m": Trial(
        {"English": ("wikitext",), "dialogue": ("doc2dial",), "mixed": ("wikitext", "doc2dial"), "self": ()},
        samples=24,
        tests=("wikitext", "tinystories", "doc2dial"),
        windows=10,
    ),
    "tiny-polyglot": Trial(
        {"Korean": ("reviews",), "dialogue": ("manual2dial",), "mixed": ("reviews", "manual2dial"), "self": ()},
        samples=48,
        tests=("reviews", "synopses", "manual2dial"),
        windows=_BUNDLED_WINDOWS,
        more={"Korean": (12, 256, 1024)},
    ),
}


class Library:
    """The texts, each read once, when it is first asked for."""

    def __init__(self, data: Path) -> None:
        self._data, self._read = data, dict[str, Parts]()

    def __getitem__(self, name: str) -> Parts:
        if name not in self._read:
            self._read[name] = CORPORA[name].read(self._data)
        return self._read[name]


class Reader:
    """A subject, and the texts that it is calibrated and tested on."""

    def __init__(self, name: str, folder: Path, library: Library) -> None:
        """Make the model.

        Args:
            name: row of :data:`TRIALS`.
            folder: keeps models, statistics and decompositions.
            library: the texts.
        """
        self.name, self.trial, self.library = name, TRIALS[name], library
        self.model = model(SUBJECTS[name], folder) if name in SUBJECTS else BUNDLED / "model"
        self.work = folder / f"{name}.work" / "texts"
        self.tokenizer = load_tokenizer(self.model)

    @cached_property
    def reference(self) -> Remembered:
        """The dense model."""
        return Remembered(load_model(self.model, "cpu", torch.float32), self.work / "hidden")

    @cached_property
    def passages(self) -> dict[str, Passage]:
        """Test texts, each of the trial's windows or as many as it has, cut as calibration texts are."""
        found = {}
        for name in self.trial.tests:
            rows = sample_tokens(self.library[name].test, self.tokenizer, samples=self.trial.windows, length=LENGTH)
            found[name] = Passage(rows.ids.flatten(), 0, LENGTH, LENGTH, "disjoint")
        return found

    def tokens(self, text: str) -> int:
        """Of a document in a calibration text, with those that begin and end it."""
        around = (opening_token(self.tokenizer), self.tokenizer.eos_token_id)
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return len(ids) + sum(token is not None for token in around)

    def statistics(self, text: str, samples: int) -> tuple[Path, Path]:
        """Statistics of a text, and a folder for its decompositions; an interrupted run goes on."""
        work = self.work / f"{text}-{samples}"
        work.mkdir(parents=True, exist_ok=True)
        calibration = Calibration(str(self._text(text, samples, work)), samples=samples, length=LENGTH)
        calibrate(self.model, calibration, work / "stats", methods=(LAW.method,), device="cpu")
        read = StatisticsFolder(work / "stats").tokens().tokens
        assert read == samples * LENGTH, f"{text} has {read} tokens"
        return work / "stats", work / "work"

    def _text(self, text: str, samples: int, work: Path) -> Path | str:
        """A file of documents, or the word of ``--calib`` for what the model writes itself."""
        parts = [self.library[source].calibration for source in self.trial.calibrations[text]]
        if not parts:
            return SELF
        path = work / "text.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for document in mixed(parts, self.tokens, samples * LENGTH):
                file.write(json.dumps({"text": document}, ensure_ascii=False) + "\n")
        return path

    def convert(self, text: str, samples: int, keep: float, out: Path, row: Row = LAW) -> Report:
        """A factored model, by way of what is kept."""
        stats, work = self.statistics(text, samples)
        return convert(
            self.model, out, keep=keep, method=row.method, allocation=row.allocation, layout=row.layout,
            stats=stats, work=work, device="cpu", check=False,
        )  # fmt: skip

    def measured(self, text: str, samples: int, keep: float) -> dict[str, Any]:
        """One line of the file: a text, a budget, and what every test text loses."""
        with tempfile.TemporaryDirectory() as temporary:
            report = self.convert(text, samples, keep, Path(temporary) / "out")
            factored = load_model(Path(temporary) / "out", "cpu", torch.float32)
            shutil.rmtree(Path(temporary) / "out")
        tests = {}
        for name, passage in self.passages.items():
            divergence = likelihoods(factored, passage, reference=self.reference).divergence
            assert divergence is not None
            tests[name] = {"tokens": passage.tokens, **asdict(divergence)}
        return {
            "subject": self.name, "text": text, "sources": list(self.trial.calibrations[text]),
            "calibration_tokens": samples * LENGTH, "keep": keep, "name": LAW.name,
            "windows": self.trial.windows, "version": __version__,
            "params": report.plan.params_after, "params_before": report.plan.params_before, "tests": tests,
        }  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Measure the lines that are asked for and not there yet."""
    library = Library(options.data)
    for name in options.subjects:
        trial, reader = TRIALS[name], Reader(name, options.folder, library)
        for text in trial.calibrations:
            for samples in (trial.samples, *trial.more.get(text, ())):
                for keep in options.keep or KEEPS:
                    key = {"subject": name, "text": text, "calibration_tokens": samples * LENGTH, "keep": keep}
                    on = {"windows": trial.windows, "version": __version__}
                    known = book.same(book.read(options.out)["texts"], key | on) is not None
                    if (options.only and text not in options.only) or (known and not options.again):
                        continue
                    line = reader.measured(text, samples, keep)
                    print(line, flush=True)
                    book.put(options.out, "texts", key, line)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real.texts")
    parser.add_argument("--data", type=Path, required=True, help="folder of all texts")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="keeps models, statistics and decompositions")
    parser.add_argument("--subjects", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="names of texts; default all")
    parser.add_argument("--keep", type=float, nargs="+", default=[], help=f"default: {KEEPS}")
    parser.add_argument("--again", action="store_true", help="also lines that are there")
    parser.add_argument("--out", type=Path, default=book.OUT, help="file name without its ending")
    run(parser.parse_args())


if __name__ == "__main__":
    main()

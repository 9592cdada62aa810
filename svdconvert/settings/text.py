"""The data of a data-aware method: a text, or statistics collected from one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from svdconvert.errors import InputError
from svdconvert.paths import user_path
from svdconvert.sentences import asked
from svdconvert.settings.row import REQUIRED, option, options_of, unknown

# Sequences at a time, unless the user says otherwise.
BATCH_SIZE = 8
LABELS = ("empirical", "sampled")
# In the place of a text: one that the model writes.
SELF = "self"
# How the names of files with texts end.
KINDS = (".txt", ".jsonl", ".parquet")


def text_path(text: str) -> Path | None:
    """The file or folder that is meant; None for the name of a data set.

    Raises:
        InputError: a file or folder is meant that does not exist.
    """
    path = user_path(text)
    if path.exists():
        return path
    if path.suffix in KINDS or path.is_absolute() or text.startswith(("./", "../", "~")):
        raise InputError(f"{text} does not exist; give a text file, a folder or the name of a data set")
    return None


@dataclass(frozen=True)
class Text:
    """A text, and how much of it is read.

    Attributes:
        text: a .txt, .jsonl or .parquet file, a folder of such files, or the name of a dataset; or ``self``, for text
            that the dense model writes, with all its weights in memory (a file of that name is ``./self``).
        field: the field of a record that holds its text.
        samples: sequences to read, or to write.
        length: tokens in each; None takes the model's longest context, at most 2048.
        seed: chooses the sequences, or draws their tokens.
        batch_size: sequences at a time.
        labels: ``empirical``, the next token of the text, or ``sampled`` from the model's own prediction.
    """

    text: str = option(
        REQUIRED,
        "--calib",
        "Text for data-aware methods: .txt, .jsonl or .parquet, a folder of them, or a dataset's name; or `self`, text "
        "that the model writes, whole in memory (a file of that name is `./self`).",
        keyword="calibration.text",
        group="Calibration",
        kind="path",
        metavar="TEXT",
    )
    field: str | None = option(
        None,
        "--calib-field",
        "Field of a record that holds its text.",
        keyword="calibration.field",
        group="Calibration",
        metavar="NAME",
    )
    samples: int = option(
        128,
        "--calib-samples",
        "Sequences to read, or to write.",
        keyword="calibration.samples",
        group="Calibration",
        kind="whole",
    )
    length: int | None = option(
        None,
        "--calib-length",
        "Tokens in each.",
        keyword="calibration.length",
        group="Calibration",
        kind="whole",
        usual="the model's longest, at most 2048",
    )
    seed: int = option(
        0,
        "--seed",
        "Chooses the sequences, or draws their tokens.",
        keyword="calibration.seed",
        group="Calibration",
        kind="whole",
    )
    batch_size: int = option(
        BATCH_SIZE,
        "--calib-batch-size",
        "Sequences at a time.",
        keyword="calibration.batch_size",
        group="Calibration",
        kind="whole",
    )
    labels: str = option(
        "empirical",
        "--labels",
        "Gradients for the text's next token, or for one that the model itself predicts.",
        keyword="calibration.labels",
        group="Calibration",
        kind="choice",
        words=LABELS,
    )

    @property
    def by_model(self) -> bool:
        """Whether the model writes it."""
        return self.text == SELF

    def check(self) -> None:
        """See whether there is such a text, before anything slow begins.

        Raises:
            InputError: a file or folder is meant that does not exist.
        """
        if not self.by_model:
            text_path(self.text)

    def __post_init__(self) -> None:
        for name, row in options_of(type(self)).items():
            object.__setattr__(self, name, row.given(getattr(self, name)))
        if self.labels not in LABELS:
            raise unknown("calibration.labels", self.labels, LABELS)
        if self.text is None:
            raise InputError(f"{asked('calibration.text', None)} is no text; give a file, a folder or a data set")
        if self.by_model and self.field is not None:
            raise InputError(
                f"{asked('calibration.field', self.field)} has no effect on {asked('calibration.text', SELF)}, text "
                f"that the model writes; leave it out, or give a file of that name as ./{SELF}"
            )
        for name in ("samples", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{asked(f'calibration.{name}')} must be at least 1")
        if self.length is not None and self.length < 2:
            raise InputError(
                f"{asked('calibration.length')} must be at least 2, since every token is predicted from those before it"
            )


def refused(given: object) -> InputError:
    """What to say of a calibration that is none: most often the path of a text."""
    return InputError(f"{asked('calibration', given)} is not a Calibration; make one with Calibration(TEXT)")


@dataclass(frozen=True)
class Stats:
    """Statistics that :func:`svdconvert.calibrate` has written.

    Attributes:
        folder: where they are.
    """

    folder: Path = option(
        REQUIRED,
        "--stats",
        "Instead of a text: folder that `svdconvert calibrate` wrote.",
        keyword="stats",
        group="Calibration",
        kind="folder",
    )

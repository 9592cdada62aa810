"""What a conversion does with its result: heal it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from svdconvert.errors import InputError
from svdconvert.sentences import asked
from svdconvert.settings.healing import Healing, HealRequest
from svdconvert.settings.output import Output
from svdconvert.settings.row import option, options_of
from svdconvert.settings.runtime import Runtime
from svdconvert.settings.text import LABELS, SELF, Stats, Text


@dataclass(frozen=True)
class Afterwards:
    """Healing at the end of a conversion; `svdconvert heal` has more settings.

    Attributes:
        heal: whether factors and scales are trained to the dense model's predictions.
        text: that they are trained on, as :attr:`Text.text`; None for that of the conversion.
        samples: sequences of it; None for as many as the conversion reads.
        epochs: times that it is gone through; None for once.
    """

    heal: bool = option(
        False,
        "--heal",
        "Also heal the result: train its factors, and the scales of weights in few bits, to the dense model's "
        "predictions, on the text of the conversion.",
        keyword="heal",
        group="Healing",
        kind="flag",
    )
    text: str | None = option(
        None,
        "--heal-calib",
        "Text to heal on in the place of that, or `self`, text that the dense model writes.",
        keyword="heal_calib",
        group="Healing",
        kind="path",
        metavar="TEXT",
    )
    samples: int | None = option(
        None,
        "--heal-samples",
        "Sequences to heal on.",
        keyword="heal_samples",
        group="Healing",
        kind="count",
        usual="as many as the conversion reads",
    )
    epochs: float | None = option(
        None,
        "--heal-epochs",
        "Times that the text is gone through to heal.",
        keyword="heal_epochs",
        group="Healing",
        kind="number",
        usual="once",
    )

    def check(self, calibration: Text | Stats | None) -> None:
        """Refuse what cannot be healed.

        Args:
            calibration: of the conversion.

        Raises:
            InputError: there is no text, or a setting has no effect.
        """
        for name, row in options_of(self).items():
            value = getattr(self, name)
            if not self.heal and value != row.default:
                raise InputError(f"{asked(row.keyword, value)} has no effect without {asked('heal', True)}")
        if self.heal and self.text is None and not isinstance(calibration, Text):
            told = " itself; statistics of one do not do" if isinstance(calibration, Stats) else ""
            raise InputError(f"{asked('heal', True)} needs a text{told}; give one as {asked('heal_calib')}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise InputError(f"{asked('heal_epochs', self.epochs)} must be above 0 and finite")

    def request(self, calibration: Text | Stats | None, output: Output, runtime: Runtime) -> HealRequest | None:
        """The request to heal; None where that is not asked for.

        Args:
            calibration: of the conversion.
            output, runtime: of the conversion.
        """
        if not self.heal:
            return None
        text = calibration if isinstance(calibration, Text) else Text(SELF)
        changes: dict[str, Any] = {"labels": LABELS[0], "samples": self.samples or text.samples}
        if self.text is not None:
            changes |= {"text": self.text, "field": None if self.text == SELF else text.field}
        text = replace(text, **changes)
        return HealRequest(text, Healing(epochs=self.epochs), output, runtime)

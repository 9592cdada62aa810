"""The whole request for a conversion in one object.

Its fields give the command line its options and the library its keywords, a job the key under which it resumes, and the
model card its command.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from svdconvert.errors import InputError
from svdconvert.methods.table import Method, method_named, method_options
from svdconvert.sentences import asked
from svdconvert.settings import rules
from svdconvert.settings.afterwards import Afterwards
from svdconvert.settings.healing import HealRequest
from svdconvert.settings.hub import Hub
from svdconvert.settings.options import BY_KEYWORD, did_you_mean
from svdconvert.settings.output import Output
from svdconvert.settings.recipe import Recipe
from svdconvert.settings.row import options_of
from svdconvert.settings.runtime import Runtime, folder_or_none
from svdconvert.settings.scope import Scope
from svdconvert.settings.size import Size, default_and_patterns
from svdconvert.settings.text import Stats, Text, refused


@dataclass(frozen=True)
class Conversion:
    """A request for a conversion, without the model and the folder of the result.

    Attributes:
        size: how small.
        scope: which matrices.
        recipe: how.
        calibration: the text to calibrate on, or statistics of one; None for neither.
        afterwards: what is done with the result.
        output: what is written.
        runtime: where the work is done.
        hub: what is read from the Hub, and where the result goes there.
    """

    size: Size = field(default_factory=Size)
    scope: Scope = field(default_factory=Scope)
    recipe: Recipe = field(default_factory=Recipe)
    calibration: Text | Stats | None = None
    afterwards: Afterwards = field(default_factory=Afterwards)
    output: Output = field(default_factory=Output)
    runtime: Runtime = field(default_factory=Runtime)
    hub: Hub = field(default_factory=Hub)

    @classmethod
    def of(cls, **keywords: Any) -> Conversion:
        """A request by the keywords of :func:`svdconvert.convert`.

        Raises:
            InputError: a keyword is unknown, a value cannot be read, or both a text and statistics are given.
        """
        given = dict(keywords)
        rank, patterns = default_and_patterns(given.pop("rank", None))
        values: dict[type, dict[str, Any]] = {Size: {"rank": rank, "patterns": patterns}}
        calibration = given.pop("calibration", None)
        if calibration is not None and not isinstance(calibration, Text):
            raise refused(calibration)
        stats = folder_or_none(given.pop("stats", None))
        if calibration is not None and stats is not None:
            raise InputError(
                f"give either {asked('calibration')}, a text, or {asked('stats')}, what was collected from one"
            )
        for word, value in given.items():
            known = BY_KEYWORD.get(word)
            if known is None:
                raise InputError(f"a conversion has no setting {word!r}{did_you_mean(word)}")
            values.setdefault(known.section, {})[known.field] = known.option.given(value)
        return cls(
            size=Size(**values[Size]),
            scope=Scope(**values.get(Scope, {})),
            recipe=Recipe(**values.get(Recipe, {})),
            calibration=calibration if stats is None else Stats(stats),
            afterwards=Afterwards(**values.get(Afterwards, {})),
            output=Output(**values.get(Output, {})),
            runtime=Runtime(**values.get(Runtime, {})),
            hub=Hub(**values.get(Hub, {})),
        )

    @property
    def method(self) -> Method:
        """The method; by default kfac with a text, or where bytes are given, which need one, and svd without."""
        plain = self.calibration is None and not self.size.in_bytes
        return method_named(self.recipe.method or ("svd" if plain else "kfac"))

    @property
    def allocation(self) -> str:
        """How a budget is spread: as asked, or as suits the method."""
        if self.recipe.allocation is not None:
            return self.recipe.allocation
        # Ranks that the user has chosen stay as they are.
        return self.method.allocation if self.size.rank is None and not self.size.patterns else "uniform"

    @property
    def options(self) -> dict[str, float]:
        """The method's settings, with defaults filled in."""
        return method_options(self.method, self.recipe.given)

    @property
    def healing(self) -> HealRequest | None:
        """The request to heal the result; None where that is not asked for."""
        return self.afterwards.request(self.calibration, self.output, self.runtime)

    def settled(self) -> Conversion:
        """The same request with method, allocation and the method's settings filled in."""
        settings: dict[str, Any] = self.options
        recipe = replace(self.recipe, method=self.method.name, allocation=self.allocation, **settings)
        return replace(self, recipe=recipe)

    def check(self) -> None:
        """Refuse a request that no model can meet.

        Raises:
            InputError: a value is impossible, or two do not go with each other.
        """
        rules.check(self, rules.ALL)

    def check_planned(self) -> None:
        """:meth:`check` without the rules that a plan does not depend on; it needs no text.

        Raises:
            InputError: as :meth:`check`.
        """
        rules.check(self, rules.PLANNED)

    def check_method(self) -> None:
        """:meth:`check` of the method, its settings and its text alone; no size is needed.

        Raises:
            InputError: as :meth:`check`.
        """
        rules.check(self, rules.METHOD)

    def planned(self) -> dict[str, Any]:
        """What a plan depends on beside the model, in JSON types."""
        return {
            "method": self.method.name,
            "targets": list(self.scope.targets),
            **self.size.key(),
            "dtype": self.output.dtype,
            "layout": self.recipe.layout,
            "share_layers": self.scope.share_layers,
            **({"share_experts": True} if self.scope.share_experts else {}),
            "split_fused": self.scope.split_fused,
            "solver": self.recipe.solver,
            "max_shard_bytes": self.output.max_shard_bytes,
        }

    def key(self, text: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the result depends on beside the model, in JSON types: what a job resumes under; without healing.

        Args:
            text: what the statistics depend on, see :class:`svdconvert.calibration.knowledge.Knowledge`.
        """
        return {
            **self.planned(),
            "allocation": self.allocation,
            "refit": self.recipe.refit,
            **self.options,
            **(text or {}),
        }

    def command(self, model: str) -> str:
        """The command that makes the same request.

        It has every field that the result depends on and that is not at its default.

        Args:
            model: as it is named on the command line.
        """
        words = ["svdconvert", model]
        for section in self._sections:
            for name, option in options_of(section).items():
                if not option.omitted_because:
                    words += option.command(getattr(section, name))
        return shlex.join([*words, "--out", "DIR"])

    def to_json(self) -> dict[str, Any]:
        """Section -> field -> value, in JSON types."""

        def plain(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: plain(one) for name, one in value.items()}
            return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

        return {name: plain(value) for name, value in asdict(self).items()}

    @property
    def _sections(self) -> list[Any]:
        """In the order of a command line."""
        text = [] if self.calibration is None else [self.calibration]
        return [self.hub, self.size, self.scope, self.recipe, *text, self.afterwards, self.output, self.runtime]

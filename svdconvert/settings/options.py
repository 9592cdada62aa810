"""The options of a conversion as one table: the command line is built from it, and so is the command of a model card.

No click and no torch.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from svdconvert.layouts.table import DEFAULT
from svdconvert.words import size_text


@dataclass(frozen=True, slots=True)
class Option:
    """One option of ``svdconvert convert``.

    Attributes:
        name: on the command line.
        default: what it is where it is not given.
        keyword: of :func:`svdconvert.convert`; with ``calibration.`` before it, a field of
            :class:`svdconvert.Calibration`.
        why_untold: empty for an option that the result depends on. Otherwise why the command that makes a result
            again leaves it out.
    """

    name: str
    default: Any
    keyword: str
    why_untold: str = ""

    @property
    def is_flag(self) -> bool:
        """Whether it stands alone, without a value."""
        return isinstance(self.default, bool)


_SPEED = "where and how fast it is computed"
_SHOWN = "what is shown"
_PLACE = "where things are kept"
_HUB = "what becomes of the finished result"

OPTIONS: tuple[Option, ...] = (
    Option("--revision", None, "revision"),
    Option("--rank", (), "rank"),
    Option("--keep", None, "keep"),
    Option("--params", None, "params"),
    Option("--rank-multiple", 1, "rank_multiple"),
    Option("--factor-all", False, "factor_all"),
    Option("--targets", (), "targets"),
    Option("--split-fused", False, "split_fused"),
    Option("--share-layers", 1, "share_layers"),
    Option("--method", None, "method"),
    Option("--alpha", None, "alpha"),
    Option("--shrinkage", None, "shrinkage"),
    Option("--allocation", None, "allocation"),
    Option("--refit", "none", "refit"),
    Option("--layout", DEFAULT.name, "layout"),
    Option("--solver", "exact", "solver"),
    Option("--calib", None, "calibration.text"),
    Option("--calib-field", None, "calibration.field"),
    Option("--calib-samples", 128, "calibration.samples"),
    Option("--calib-length", None, "calibration.length"),
    Option("--calib-batch-size", 8, "calibration.batch_size"),
    Option("--labels", "empirical", "calibration.labels"),
    Option("--seed", 0, "calibration.seed"),
    Option("--stats", None, "stats"),
    Option("--dtype", "keep", "dtype"),
    Option("--max-shard-size", "5GB", "max_shard_size"),
    # What is kept is the decomposition of whole matrices, whose factors differ by rounding from those made at once.
    Option("--work", None, "work"),
    Option("--out", None, "out", "always there, as DIR"),
    Option("--overwrite", False, "overwrite", _PLACE),
    Option("--keep-work", False, "keep_work", "told as --work"),
    Option("--no-check", False, "check", "looks at the result, and measures its loss"),
    Option("--dry-run", False, "", _SHOWN),
    Option("--device", "auto", "device", _SPEED),
    Option("--workers", None, "workers", _SPEED),
    Option("--json", False, "", _SHOWN),
    Option("--verbose", False, "", _SHOWN),
    Option("--push-to-hub", None, "push_to_hub", _HUB),
    Option("--private", False, "private", _HUB),
    Option("--hub-revision", None, "hub_revision", _HUB),
)

BY_NAME: Mapping[str, Option] = {option.name: option for option in OPTIONS}

# Keyword -> option: of a conversion, and those of other commands that are not called like their keyword.
_NAMES: Mapping[str, str] = {
    **{option.keyword: option.name for option in OPTIONS if option.keyword},
    "calibration": "--calib",
    "methods": "--method",
    "layouts": "--layout",
    "plot": "--no-plot",
}


def option_name(field: str) -> str:
    """What the command line calls a keyword of the library.

    Args:
        field: a keyword of a public function, or ``calibration.`` and a field of a calibration.
    """
    return _NAMES.get(field, f"--{field.replace('_', '-')}")


def short_command(what: str, max_shard_bytes: int) -> str:
    """The command that makes a result of densify or fold again, which depends on the size of its files alone.

    Args:
        what: the command and its arguments.
        max_shard_bytes: of a weight file.
    """
    size = size_text(max_shard_bytes)
    sized = [] if size == BY_NAME["--max-shard-size"].default else ["--max-shard-size", size]
    return " ".join(["svdconvert", what, *sized, "--out", "DIR"])


def repeating_command(model: str, values: Mapping[str, Any]) -> str:
    """The command that makes a result again: every option that it depends on and that is not at its default.

    Args:
        model: as it is named on the command line.
        values: of all options that a result depends on, by name; sizes in bytes.
    """
    told = {option.name for option in OPTIONS if not option.why_untold}
    assert told == set(values), sorted(told ^ set(values))
    words = ["svdconvert", model]
    for option in OPTIONS:
        if option.why_untold:
            continue
        value = values[option.name]
        if option.name == "--max-shard-size":
            value = size_text(value)
        if value == option.default:
            continue
        if option.is_flag:
            words.append(option.name)
            continue
        for one in value if isinstance(option.default, tuple) else [value]:
            words += [option.name, repr(one) if isinstance(one, float) else str(one)]
    return shlex.join([*words, "--out", "DIR"])

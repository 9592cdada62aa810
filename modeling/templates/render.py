"""Render what is written of each family's row: its modeling file, and the table in docs/families.md. `make modeling`.

Everything that families share is in factored.py.jinja. Two templates fill in the rest: gpt_neox.py.jinja for the family
whose head and rotary settings have names of their own, decoder.py.jinja for all others,
which tower.py.jinja extends for a model that sees around its language model. What comes out is checked in,
since it is what runs in a user's process, and formatted, since names of any length are put into it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from svdconvert.families.mixture import CountedTwice
from svdconvert.families.rotary import Rotary
from svdconvert.families.row import Architecture
from svdconvert.families.table import ARCHITECTURES
from svdconvert.families.tower import Tower
from svdconvert.families.towers import TOWERS

TEMPLATES = Path(__file__).parent
MODELING = TEMPLATES.parent
PAGE = MODELING.parent / "docs" / "families.md"

# What no row needs to say: every family has this version.
OLDEST = (4, 46)


def render(row: Architecture, tower: Tower | None = None) -> str:
    """The text of a family's modeling file; of a model that sees, around the row of its language model."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(f"{row.template}.py.jinja").render(_fields(row, tower))
    return _formatted(text)


def _fields(row: Architecture, tower: Tower | None) -> dict[str, Any]:
    endings = ("Config", "Model", *(("ForSequenceClassification",) if row.classifies else ()))
    endings += ("ForTokenClassification",) if row.labels else ()
    rotary = row.config_overrides if isinstance(row.config_overrides, Rotary) else None
    blocks = row.pieces.blocks
    return {
        "title": row.title or row.stock,
        "stock": row.stock,
        "factored": row.factored,
        "model_type": row.model_type,
        "svd_model_type": row.svd_model_type,
        "causal": row.causal,
        "classifies": row.classifies,
        "labels": row.labels,
        "labels_4": row.labels_4,
        "head_bias": row.head_bias,
        "kept": row.kept,
        "asks_parallel": row.asks_parallel,
        "filled": row.filled,
        "transposed": row.transposed,
        "auto_map": row.auto_map if tower is None else tower.auto_map,
        "tower": tower,
        "inside": "" if tower is None else r"(?:language_model\.)?",
        "inner": row.inner,
        "since_5": row.since >= (5, 0),
        "imports": sorted(
            {row.inner + ending for ending in endings}
            | {row.stock + ending for ending in (row.causal, "PreTrainedModel")}
        ),
        "blocks": blocks,
        "base": row.prefix.removesuffix("."),
        "linear": "Conv1D" if row.transposed else "nn.Linear",
        "sizes": "tuple(reversed(layer.weight.shape))" if row.transposed else "tuple(layer.weight.shape)",
        "example": f"{blocks}.0.{row.targets[0]}",
        "second": f"{blocks}.1.{row.targets[0]}",
        "skipped": row.targets[0].rpartition(".")[2],
        "width": row.head_width,
        "rotary": rotary is not None,
        "theta": rotary and rotary.theta,
        "partial": rotary is not None and rotary.fraction is not None,
        "fraction": rotary and rotary.fraction,
        "three_fields": rotary is not None and rotary.three_fields,
        "scaling": rotary and rotary.scaling,
        "experts": row.experts,
        "kinds": row.kinds,
        "old_kinds": row.old_kinds,
        "mixer": row.mixer,
        "fills": row.fills,
        "counted_twice": isinstance(row.config_overrides, CountedTwice),
        **_fused_fields(row, blocks),
    }


def _fused_fields(row: Architecture, blocks: str) -> dict[str, Any]:
    """What is said of the projections that may be split; all of a family are of one kind."""
    if not row.fused:
        return {"fused": ()}
    (name, fused), *_ = row.fused.items()
    linear = (
        "_conv1d(count * size, inputs, old)"
        if row.transposed
        else "nn.Linear(inputs, count * size, bias=old.bias is not None, "
        "device=old.weight.device, dtype=old.weight.dtype)"
    )
    return {
        "fused": tuple(row.fused),
        "fused_names": fused.names,
        "by_head": fused.by_head,
        "new_linear": linear,
        "split_example": f"{blocks}.0.{name}.{fused.names[0]}",
    }


def _formatted(text: str) -> str:
    """As `make format` leaves it."""
    command = [sys.executable, "-m", "ruff", "format", "--stdin-filename", str(MODELING / "rendered.py"), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def page() -> str:
    """The text of docs/families.md with the tables of families and of models that see as the rows have them."""
    text = PAGE.read_text(encoding="utf-8")
    # of five columns and of four, as no other table of the page
    for bar, lines in (
        ("\n|---|---|---|---|---|\n", map(_line, ARCHITECTURES.values())),
        ("\n|---|---|---|---|\n", map(_seeing_line, TOWERS)),
    ):
        before, _, rest = text.partition(bar)
        text = before + bar + "\n".join(lines) + "\n\n" + rest.partition("\n\n")[2]
    return text


def _line(row: Architecture) -> str:
    models = row.models
    if row.since > OLDEST:
        models += f", from transformers {row.since[0]}.{row.since[1]} on"
    each = [name for name in row.targets if ".*." in name]
    layers = f"{len(row.targets) - len(each)}{', q, k and v in one' if row.fused else ''}"
    layers += f", and {len(each)} of every expert" if each else ""
    return f"| `{row.model_type}` | {models} | `{row.causal_class}` | {layers} | {row.remarks} |"


def _seeing_line(tower: Tower) -> str:
    since = ".".join(map(str, tower.since))
    return (
        f"| `{tower.model_type}`, `{tower.language_types[0]}` | {tower.models} | `{tower.factored_class}` | {since} |"
    )


def main() -> None:
    """Write every file."""
    for row in ARCHITECTURES.values():
        (MODELING / f"{row.modeling}.py").write_text(render(row), encoding="utf-8")
    for tower in TOWERS:
        (MODELING / f"{tower.modeling}.py").write_text(render(tower.rendered, tower), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()

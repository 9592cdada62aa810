"""Options that several commands share."""

from __future__ import annotations

import click

from svdconvert.cli.fields import ask, ask_all
from svdconvert.cli.groups import option, options
from svdconvert.cli.types import COUNT, FOLDER, Model
from svdconvert.settings.scope import Scope
from svdconvert.settings.size import Size
from svdconvert.settings.text import Stats, Text

model_argument = click.argument("model", type=Model())
folder_argument = click.argument("folder", type=FOLDER)

json_option = option(
    "--json", "as_json", is_flag=True, group="Running", help="Print the result as JSON on standard output."
)
verbose_option = option("-v", "--verbose", is_flag=True, group="Running", help="A line for every matrix.")
quiet_option = option(
    "-q", "--quiet", is_flag=True, group="Running", help="No progress and no notes: what was written, and errors."
)
device_option = ask("device")
workers_option = ask("workers")
work_option = ask("work")
revision_option = ask("revision")
private_option = ask("private")
hub_revision_option = ask("hub_revision")
shard_option = ask("max_shard_size")
overwrite_option = ask("overwrite")
dtype_option = ask("dtype")
split_option = ask("split_fused")
targets_option = ask("targets")
allocation_option = ask("allocation")
refit_option = ask("refit")
method_options = options(ask("alpha"), ask("shrinkage"))
text_options = ask_all(Text, Stats)
plan_options = options(
    ask_all(Size, Scope), *map(ask, ("method", "layout", "solver", "dtype", "max_shard_size", "revision"))
)

window_options = options(
    option(
        "--window",
        type=int,
        group="Measuring",
        help="Tokens per input.  [default: 1024, or the model's longest context]",
    ),
    option("--stride", type=int, group="Measuring", help="Tokens the window moves.  [default: half the window]"),
    option(
        "--batch-size",
        type=COUNT,
        group="Measuring",
        help="Windows at a time.  [default: 8, fewer for large vocabularies]",
    ),
)

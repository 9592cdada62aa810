"""Options that several commands share."""

from __future__ import annotations

import click

from svdconvert.cli.groups import COUNT, FOLDER, MethodName, Model, Word, option, options
from svdconvert.layouts import table as layouts

LAYOUTS = click.Choice(list(layouts.LAYOUTS))
DTYPES = click.Choice(["keep", "float16", "bfloat16", "float32"])

model_argument = click.argument("model", type=Model())
folder_argument = click.argument("folder", type=FOLDER)

json_option = option(
    "--json", "as_json", is_flag=True, group="Running", help="Print the result as JSON on standard output."
)
device_option = option(
    "--device",
    type=Word(["auto", "cpu", "cuda", "cuda:N"]),
    default="auto",
    show_default=True,
    group="Running",
    help="What computes; auto takes a GPU if there is one.",
)
workers_option = option(
    "--workers",
    type=COUNT,
    group="Running",
    help="Matrices solved at a time.  [default: one a core, up to 8; two on a GPU]",
)
verbose_option = option("-v", "--verbose", is_flag=True, group="Running", help="A line for every matrix.")
revision_option = option(
    "--revision", metavar="R", group="Hub", help="Branch, tag or commit of a Hub repository that is read."
)
private_option = option("--private", is_flag=True, group="Hub", help="Create the repository as a private one.")
hub_revision_option = option("--hub-revision", metavar="B", group="Hub", help="Branch to upload to.")

shard_option = option(
    "--max-shard-size",
    metavar="SIZE",
    group="Output",
    default="5GB",
    show_default=True,
    help="Largest weight file to write: 500MB or 5GB in powers of 1000, 2GiB in powers of 1024, or a number of bytes.",
)
overwrite_option = option(
    "--overwrite",
    is_flag=True,
    group="Output",
    help="Replace what svdconvert has written there; other files stay.",
)
dtype_option = option("--dtype", type=DTYPES, group="Output", help="Type of the stored weights.")

split_option = option(
    "--split-fused",
    is_flag=True,
    group="What to factor",
    help="Factor queries, keys and values that are one matrix as three.",
)
targets_option = option(
    "--targets",
    multiple=True,
    metavar="PATTERN",
    group="What to factor",
    help="Factor only linear layers that match (repeatable).  [default: the linear layers of every block]",
)
method_option = option(
    "--method",
    type=MethodName(),
    group="Method",
    help="How the factors are computed.  [default: kfac where there is a text, else svd]",
)
layout_option = option(
    "--layout",
    type=LAYOUTS,
    group="Method",
    help="Two factors, or rows of each matrix and the coefficients of the others: more rank for the same size.",
)

plan_options = options(
    option(
        "--rank",
        "ranks",
        multiple=True,
        metavar="N|PATTERN=N",
        group="Size",
        help="Rank of every target, or of those a pattern names (repeatable; the last match wins): "
        "--rank 768 --rank attention.dense=512 --rank 'layers.0.*=1024'.",
    ),
    option(
        "--keep",
        type=float,
        metavar="FRACTION",
        group="Size",
        help="Instead: fraction of the target parameters to keep.",
    ),
    option(
        "--params", metavar="COUNT", group="Size", help="Instead: parameters of the whole result, for example 1.4B."
    ),
    option(
        "--rank-multiple",
        type=int,
        metavar="N",
        group="Size",
        help="Every rank a multiple of N, 8 or 64 say, as matrix kernels like them; budgets are rounded down.",
    ),
    option("--factor-all", is_flag=True, group="Size", help="Factor also where the rank saves nothing."),
    targets_option,
    split_option,
    option(
        "--share-layers",
        type=int,
        metavar="N",
        group="What to factor",
        help="Consecutive layers that share the input-side factor of each kind of matrix, stored once.",
    ),
    method_option,
    layout_option,
    option(
        "--solver",
        type=click.Choice(["exact", "fast"]),
        group="Method",
        help="fast: plain SVD at low ranks on the CPU 1.5 times as fast or more, at most 0.1% above the least error by "
        "its own estimate.",
    ),
    dtype_option,
    shard_option,
    revision_option,
)

text_options = options(
    option(
        "--calib",
        type=click.Path(),
        metavar="TEXT",
        group="Calibration",
        help="Text for data-aware methods: .txt, .jsonl or .parquet, a folder of them, or a dataset's name.",
    ),
    option("--calib-field", metavar="NAME", group="Calibration", help="Field of a record that holds its text."),
    option("--calib-samples", type=int, group="Calibration", help="Sequences to read."),
    option(
        "--calib-length",
        type=int,
        group="Calibration",
        help="Tokens in each.  [default: the model's longest, at most 2048]",
    ),
    option("--calib-batch-size", type=int, group="Calibration", help="Sequences at a time."),
    option(
        "--labels",
        type=click.Choice(["empirical", "sampled"]),
        group="Calibration",
        help="Gradients for the text's next token, or for one that the model itself predicts.",
    ),
    option("--seed", type=int, group="Calibration", help="Chooses the sequences."),
)

allocation_option = option(
    "--allocation",
    type=click.Choice(["uniform", "global"]),
    group="Method",
    help="Spend a budget evenly, or where it helps most; the latter is for kfac, and often hurts others.  "
    "[default: global for kfac, else uniform]",
)
refit_option = option(
    "--refit",
    type=click.Choice(["none", "sequential"]),
    group="Method",
    help="Fit outer factors to the dense model on the inputs that the compressed layers before them give.",
)
stats_option = option(
    "--stats", type=FOLDER, group="Calibration", help="Instead of a text: folder that `svdconvert calibrate` wrote."
)
metric_options = options(
    option("--alpha", type=float, group="Method", help="Exponent of asvd.  [default: 0.5]"),
    option(
        "--shrinkage",
        type=float,
        group="Method",
        help="Pull the metrics of kfac and whiten towards their diagonal, 0 to 1.  [default: 0.2 and 0]",
    ),
)
work_option = option(
    "--work", type=FOLDER, group="Running", help="Folder that keeps statistics and decompositions for other runs."
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

"""The program itself, and the commands that lead to a factored model."""

from __future__ import annotations

import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from svdconvert import processes
from svdconvert.errors import InputError, JobError, SvdconvertError

DEFAULT_COMMAND = "convert"
# What several processes can share; under a launcher, the first of them does the others alone.
SHARED_COMMANDS = ("convert", "calibrate", "densify", "fold")
# Launchers end all processes when one has failed: in so many seconds another one has said what was wrong.
_LET_SPEAK = 1.0

_Command = TypeVar("_Command", bound=Callable[..., Any])


class DefaultGroup(click.Group):
    """A group whose first word may also be the argument of its default command: `svdconvert MODEL --rank 768`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args and args[0] not in self.commands and args[0] not in own:
            close = difflib.get_close_matches(args[0], self.commands, cutoff=0.7)
            # While a shell completes a line, nothing in it is an error yet.
            if close and not ctx.resilient_parsing and not Path(args[0]).exists():
                raise InputError(f"there is no command {args[0]!r}; did you mean {close[0]!r}?")
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if processes.launched() and not ctx.resilient_parsing:
            if name in SHARED_COMMANDS:
                processes.join()
            elif processes.launched_rank() > 0:
                ctx.exit()
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            processes.leave()
            return result
        except KeyboardInterrupt:
            # click itself would say "Aborted!" and no more.
            raise JobError("interrupted; the same command goes on where it stopped") from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # OpenMP's threads wait for each other by spinning; where other processes hold a core, an eigen-decomposition
        # then takes up to ten times as long (docs/measurements.md). It is read when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if processes.launched_rank() > 0:
            # One process speaks for all.
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        try:
            return super().main(*args, **kwargs)
        except SvdconvertError as error:
            _fail(str(error), error.exit_code)
        except MemoryError:
            _fail("out of memory; use fewer --workers or a machine with more, the same command goes on", 1)
        except RuntimeError as error:
            # torch raises its own error type when a GPU is full, and importing torch only to name it costs seconds.
            if type(error).__name__ != "OutOfMemoryError" and "can't allocate memory" not in str(error):
                raise
            _fail("out of memory on the device; use --device cpu, the same command goes on otherwise", 1)
        except SystemExit as end:
            if end.code and processes.launched_rank() > 0:
                time.sleep(_LET_SPEAK)
            raise
        finally:
            if processes.launched_rank() > 0:
                sys.stderr = sys.__stderr__  # a traceback is for everybody to see


def _fail(message: str, exit_code: int) -> NoReturn:
    # Names in files may hold anything; a terminal is not to be steered by them.
    message = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    group = processes.current()
    if group.size == 1:
        click.echo(f"Error: {message}", err=True)
    elif group.claim_error():
        click.echo(f"Error: {message}", file=sys.__stderr__)
    else:
        time.sleep(_LET_SPEAK)
    sys.exit(exit_code)


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="svdconvert")
def main() -> None:
    """Make a Hugging Face language model a fraction of its size by low-rank factorization.

    \b
    svdconvert polyglot-ko-3.8b --rank 768 --out DIR
    is short for `svdconvert convert ...`; the result loads with
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).
    """


def _options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_LAYOUTS = click.Choice(["balanced", "pivoted"])
_DTYPES = click.Choice(["keep", "float16", "bfloat16", "float32"])
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
shard_option = click.option(
    "--max-shard-size", default="5GB", show_default=True, help="Largest weight file to write (decimal units)."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace what the output folder holds.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="A line for every matrix.")
private_option = click.option("--private", is_flag=True, help="Create the repository as a private one.")

split_option = click.option(
    "--split-fused", is_flag=True, help="Factor queries, keys and values that are one matrix as three."
)
_plan_options = _options(
    click.option(
        "--rank",
        "ranks",
        multiple=True,
        metavar="N|PATTERN=N",
        help="Rank of every target, or of those a pattern names (repeatable; the last match wins): "
        "--rank 768 --rank attention.dense=512 --rank 'layers.0.*=1024'.",
    ),
    click.option("--keep", type=float, metavar="FRACTION", help="Instead: fraction of the target parameters to keep."),
    click.option("--params", metavar="COUNT", help="Instead: parameters of the whole result, for example 1.4B."),
    click.option(
        "--targets",
        multiple=True,
        metavar="PATTERN",
        help="Factor only linear layers that match (repeatable). [default: the linear layers of every block]",
    ),
    click.option("--method", help="How the factors are computed.  [default: kfac where there is a text, else svd]"),
    click.option("--dtype", type=_DTYPES, default="keep", show_default=True, help="Type of the stored weights."),
    shard_option,
    click.option("--revision", metavar="R", help="Branch, tag or commit of a Hub repository."),
    click.option(
        "--layout",
        type=_LAYOUTS,
        default="balanced",
        show_default=True,
        help="Two factors, or rows of each matrix and the coefficients of the others: more rank for the same size.",
    ),
    click.option(
        "--rank-multiple",
        type=int,
        default=1,
        show_default=True,
        metavar="N",
        help="Every rank a multiple of N, 8 or 64 say, as matrix kernels like them; budgets are rounded down.",
    ),
    click.option(
        "--share-layers",
        type=int,
        metavar="N",
        default=1,
        show_default=True,
        help="Consecutive layers that share the input-side factor of each kind of matrix, stored once.",
    ),
    split_option,
    click.option(
        "--solver",
        type=click.Choice(["exact", "fast"]),
        default="exact",
        show_default=True,
        help="fast: plain SVD at low ranks on the CPU 1.5 times as fast or more, at most 0.1% above the least error by "
        "its own estimate.",
    ),
    click.option("--factor-all", is_flag=True, help="Factor also where the rank saves nothing."),
)


_text_options = _options(
    click.option(
        "--calib",
        metavar="TEXT",
        help="Text for data-aware methods: .txt, .jsonl or .parquet, a folder of them, or a dataset's name.",
    ),
    click.option("--calib-field", metavar="NAME", help="Field of a record that holds its text."),
    click.option("--calib-samples", type=int, default=128, show_default=True, help="Sequences to read."),
    click.option("--calib-length", type=int, help="Tokens in each.  [default: the model's longest, at most 2048]"),
    click.option("--calib-batch-size", type=int, default=8, show_default=True, help="Sequences at a time."),
    click.option(
        "--labels",
        type=click.Choice(["empirical", "sampled"]),
        default="empirical",
        show_default=True,
        help="Gradients for the text's next token, or for one that the model itself predicts.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Chooses the sequences."),
)
_allocation_option = click.option(
    "--allocation",
    type=click.Choice(["uniform", "global"]),
    help="Spend a budget evenly, or where it helps most; the latter is for kfac, and often hurts others.  "
    "[default: global for kfac, else uniform]",
)
_workers_option = click.option(
    "--workers",
    type=click.IntRange(1),
    help="Matrices solved at a time.  [default: one a core, up to 8; two on a GPU]",
)
_refit_option = click.option(
    "--refit",
    type=click.Choice(["none", "sequential"]),
    default="none",
    show_default=True,
    help="Fit outer factors to the dense model on the inputs that the compressed layers before them give.",
)
_method_options = _options(
    click.option("--stats", type=click.Path(path_type=Path), help="Instead: folder that `svdconvert calibrate` wrote."),
    click.option("--alpha", type=float, help="Exponent of asvd.  [default: 0.5]"),
    click.option(
        "--shrinkage",
        type=float,
        help="Pull the metrics of kfac and whiten towards their diagonal, 0 to 1.  [default: 0.2 and 0]",
    ),
    click.option(
        "--work",
        type=click.Path(path_type=Path),
        help="Folder that keeps statistics and decompositions for other runs.",
    ),
)


@main.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write.  [required unless --dry-run]")
@_plan_options
@device_option
@_text_options
@_allocation_option
@_method_options
@_refit_option
@click.option("--keep-work", is_flag=True, help="Keep them beside the result: short for --work OUT-work.")
@_workers_option
@overwrite_option
@click.option("--no-check", is_flag=True, help="Leave out the check of the result: keys, shapes and logits.")
@click.option("--dry-run", is_flag=True, help="Say what would happen, from headers alone, and stop.")
@json_option
@verbose_option
@click.option("--push-to-hub", metavar="REPO", help="Upload the result to this repository.")
@private_option
@click.option("--hub-revision", metavar="B", help="Branch to upload to.")
def convert(
    model: str,
    out: Path | None,
    device: str,
    allocation: str | None,
    stats: Path | None,
    alpha: float | None,
    shrinkage: float | None,
    refit: str,
    work: Path | None,
    keep_work: bool,
    workers: int | None,
    overwrite: bool,
    no_check: bool,
    dry_run: bool,
    as_json: bool,
    verbose: bool,
    push_to_hub: str | None,
    private: bool,
    hub_revision: str | None,
    **request: Any,
) -> None:
    """Factor MODEL and write the result to a folder (the default command).

    MODEL is a local folder, `owner/name` on the Hub, or a short name: polyglot-ko-1.3b, -3.8b, -5.8b, -12.8b. A run
    that was interrupted goes on when the same command is given again.
    """
    calibration = _calibration(request)
    if dry_run:
        from svdconvert.calibrating import default_method
        from svdconvert.fast import check_solver

        request["method"] = default_method(request["method"], calibration, stats)
        check_solver(
            request["solver"],
            request["method"],
            allocation=allocation,
            refit=refit,
            keeps=keep_work or work is not None,
        )
        _show_plan(model, out, as_json, request)
        return
    if out is None:
        raise InputError("--out is missing: the folder to write the factored model to")
    from svdconvert.conversion import convert as run
    from svdconvert.report import TerminalEvents, show_result

    console = console_for(as_json)
    with TerminalEvents(console, verbose=verbose) as events:
        result = run(
            model,
            out,
            **_request(request),
            device=device,
            calibration=calibration,
            allocation=allocation,
            stats=stats,
            alpha=alpha,
            shrinkage=shrinkage,
            refit=refit,
            work=work,
            keep_work=keep_work,
            workers=workers,
            overwrite=overwrite,
            check=not no_check,
            push_to_hub=push_to_hub,
            private=private,
            hub_revision=hub_revision,
            events=events,
        )
    if as_json:
        print_json(result.to_json())
    else:
        show_result(console, result)


@main.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), help="Folder that would be written, for the disk's free room.")
@_plan_options
@json_option
def plan(model: str, out: Path | None, as_json: bool, **request: Any) -> None:
    """Say what a conversion would do, from config and headers alone.

    For a Hub repository only headers are downloaded; a folder with nothing but config.json will do.
    """
    _show_plan(model, out, as_json, request)


@main.command()
@click.argument("model")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write the statistics to.")
@click.option(
    "--method", "methods", multiple=True, default=["kfac"], show_default=True, help="What they are for (repeatable)."
)
@_text_options
@click.option("--revision", metavar="R", help="Branch, tag or commit of a Hub repository.")
@device_option
def calibrate(model: str, out: Path, methods: Sequence[str], revision: str | None, device: str, **text: Any) -> None:
    """Collect the statistics of data-aware methods once, for many conversions (`--stats`)."""
    calibration = _calibration(text)
    if calibration is None:
        raise InputError("--calib is missing: the text to collect statistics from")
    from svdconvert.calibrating import calibrate as run
    from svdconvert.report import TerminalEvents

    with TerminalEvents(console_for(False)) as events:
        run(model, calibration, out, methods=methods, revision=revision, device=device, events=events)
    click.echo(f"statistics written to {out}")


@main.command()
@click.argument("model")
@click.option("--method", help="Whose metrics to look in.  [default: kfac where there is a text, else svd]")
@_text_options
@_method_options
@click.option("--targets", multiple=True, metavar="PATTERN", help="Only linear layers that match (repeatable).")
@split_option
@click.option("--layout", type=_LAYOUTS, default="balanced", show_default=True, help="What break-even is told for.")
@click.option("--revision", metavar="R", help="Branch, tag or commit of a Hub repository.")
@device_option
@click.option("--per-layer", is_flag=True, help="A line for every matrix, instead of three for every kind.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write spectrum.json and spectrum.png to.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw to this .png, .svg or .pdf.")
@json_option
def spectrum(model: str, per_layer: bool, out: Path | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Singular values of MODEL's matrices, how they fall off, and what break-even keeps of them.

    Of the weights themselves, or, with --method and a text, as that method weighs them.
    """
    from svdconvert.plots import check_picture, need_matplotlib

    if out is not None:
        need_matplotlib()
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; give a folder with --out")
    if plot is not None:
        check_picture(plot)
    calibration = _calibration(options)
    from svdconvert.plots import save_figure, spectrum_figure
    from svdconvert.report import TerminalEvents, show_spectra
    from svdconvert.spectra import spectrum as run

    console = console_for(as_json)
    with TerminalEvents(console) as events:
        found = run(model, calibration=calibration, **options, events=events)
    if out is not None:
        from svdconvert.writer import atomic_write, disk_errors

        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            atomic_write(out / "spectrum.json", (json.dumps(found.to_json(), ensure_ascii=False) + "\n").encode())
    for picture in (*([out / "spectrum.png"] if out else []), *([plot] if plot else [])):
        save_figure(spectrum_figure(found), picture)
    if as_json:
        print_json(found.to_json())
    else:
        show_spectra(console, found, per_layer=per_layer)
        for place in (out, plot):
            if place is not None:
                click.echo(f"written to {place}")


@main.command()
@click.argument("model")
@click.option("--text", type=click.Path(path_type=Path), required=True, help="UTF-8 text file to measure on.")
@click.option("--keep", metavar="FRACTIONS", help="Fractions of the target parameters to keep: 0.3,0.5,0.7.")
@click.option("--rank", metavar="RANKS", help="Instead: ranks of every target: 128,256.")
@click.option(
    "--method",
    "methods",
    multiple=True,
    help="How to factor (repeatable).  [default: kfac where there is a text, else svd]",
)
@click.option(
    "--layout",
    "layouts",
    type=_LAYOUTS,
    multiple=True,
    default=["balanced"],
    show_default=True,
    help="How products are stored (repeatable).",
)
@_allocation_option
@_text_options
@_method_options
@_refit_option
@click.option("--targets", multiple=True, metavar="PATTERN", help="Only linear layers that match (repeatable).")
@split_option
@click.option("--dtype", type=_DTYPES, default="keep", show_default=True, help="Type of the stored weights.")
@click.option("--window", type=int, help="Tokens per input.  [default: 1024, or the model's longest context]")
@click.option("--stride", type=int, help="Tokens the window moves.  [default: half the window]")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Windows at a time.")
@_workers_option
@click.option("--revision", metavar="R", help="Branch, tag or commit of a Hub repository.")
@device_option
@click.option("--out", type=click.Path(path_type=Path), help="Folder for sweep.json, sweep.md, sweep.png.  [required]")
@click.option("--keep-models", is_flag=True, help="Keep every converted model in OUT/models.")
@click.option("--no-plot", is_flag=True, help="Write no sweep.png; needs no matplotlib.")
@overwrite_option
@json_option
def sweep(
    model: str,
    text: Path,
    keep: str | None,
    rank: str | None,
    out: Path | None,
    no_plot: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Perplexity of MODEL at several sizes, from one calibration: a table and a picture.

    The same command again goes on with an interrupted sweep; with other budgets, methods or layouts it adds to what
    the folder holds.
    """
    budgets: dict[str, Any] = {"keep": _numbers("--keep", keep, float), "rank": _numbers("--rank", rank, int)}
    calibration = _calibration(options)
    if out is None:
        raise InputError("--out is missing: the folder to write the sweep to")
    if not no_plot:
        from svdconvert.plots import need_matplotlib

        need_matplotlib()
    from svdconvert.report import TerminalEvents, show_sweep
    from svdconvert.sweeping import sweep as run

    console = console_for(as_json)
    with TerminalEvents(console) as events:
        result = run(model, text, out, **budgets, **options, calibration=calibration, plot=not no_plot, events=events)
    if as_json:
        print_json(result.to_json())
    else:
        show_sweep(console, result)


def _calibration(options: dict[str, Any]) -> Any:
    """Take the text's options out of all; None without a text."""
    from svdconvert.calibrating import Calibration

    names = {"calib": "text", "seed": "seed", "labels": "labels"}
    names |= {f"calib_{name}": name for name in ("field", "samples", "length", "batch_size")}
    chosen = {field: options.pop(option) for option, field in names.items()}
    return None if chosen["text"] is None else Calibration(**chosen)


def _numbers(option: str, text: str | None, kind: Callable[[str], float]) -> list[float]:
    """``0.3,0.5`` -> [0.3, 0.5]."""
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} {text!r} is no list of numbers; separate them by commas") from None


def _request(options: dict[str, Any]) -> dict[str, Any]:
    """Command-line options in the terms of :func:`svdconvert.convert`."""
    from svdconvert.ranks import parse_count, parse_rank_options

    options = dict(options)
    default, patterns = parse_rank_options(options.pop("ranks"))
    rank: int | dict[str, int] | None = default
    if patterns:
        rank = {**patterns, **({} if default is None else {"*": default})}
    params = options.pop("params")
    return {**options, "rank": rank, "params": None if params is None else parse_count(params)}


def _show_plan(model: str, out: Path | None, as_json: bool, options: dict[str, Any]) -> None:
    from svdconvert.conversion import plan as make
    from svdconvert.job import free_bytes
    from svdconvert.report import show_plan

    made = make(model, **_request(options))
    if as_json:
        print_json(made.to_json())
    else:
        show_plan(console_for(as_json), made, free_bytes(out or Path()))


def need_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")


def console_for(as_json: bool) -> Any:
    """Where people read: standard output, or standard error while that carries JSON."""
    from rich.console import Console

    stream = sys.stderr if as_json else sys.stdout
    # Without a terminal nobody wraps lines: give tables the room they need.
    return Console(file=stream, width=None if stream.isatty() else 140)


def print_json(value: object) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))

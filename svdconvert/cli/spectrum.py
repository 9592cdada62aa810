"""`svdconvert spectrum`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from svdconvert.cli.fields import ask, take_calibration
from svdconvert.cli.groups import option
from svdconvert.cli.parameters import (
    device_option,
    json_option,
    method_options,
    model_argument,
    revision_option,
    split_option,
    targets_option,
    text_options,
    work_option,
)
from svdconvert.cli.program import main
from svdconvert.cli.screen import console_for, print_json
from svdconvert.cli.types import FILE, FOLDER
from svdconvert.errors import InputError
from svdconvert.sentences import asked


@main.command()
@model_argument
@ask("method")
@method_options
@ask("layout", help="Layout that break-even is computed for.")
@text_options
@targets_option
@split_option
@option("--per-layer", is_flag=True, group="Output", help="A line for every matrix, instead of three for every kind.")
@option("--out", type=FOLDER, group="Output", help="Folder to write spectrum.json and spectrum.png to.")
@option("--plot", type=FILE, group="Output", help="Draw to this .png, .svg or .pdf.")
@work_option
@revision_option
@device_option
@json_option
def spectrum(model: str, per_layer: bool, out: Path | None, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Singular values of MODEL's matrices, how they fall off, and what break-even keeps of them.

    By default of the weights themselves; with --method and a text, of the weights in that method's metrics.
    """
    from svdconvert.commands.figures import check_picture, need_matplotlib

    if out is not None:
        need_matplotlib()
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; give a folder with {asked('out')}")
    if plot is not None:
        check_picture(plot)
    calibration = take_calibration(options)
    from svdconvert.cli.progress import TerminalEvents
    from svdconvert.cli.report import show_spectra
    from svdconvert.commands.figures import save_figure, spectrum_figure
    from svdconvert.commands.spectrum import spectrum as run

    console = console_for(as_json)
    with TerminalEvents(console) as events:
        found = run(model, calibration=calibration, **options, events=events)
    if out is not None:
        from svdconvert.storage.disk import atomic_write, disk_errors

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

"""The program itself: its commands, its errors, and which of several processes prints."""

from __future__ import annotations

import difflib
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from svdconvert.cli.groups import GroupedCommand
from svdconvert.errors import InputError, JobError, SvdconvertError, out_of_memory
from svdconvert.machine import interrupts, processes
from svdconvert.sentences import printable
from svdconvert.settings.told import told
from svdconvert.version import __version__

DEFAULT_COMMAND = "convert"
# Commands that several processes can share; under a launcher, the first process runs the others alone.
SHARED_COMMANDS = ("convert", "calibrate", "densify", "fold", "heal")
# Longest message, in characters.
_LONGEST = 2000
# Launchers end all processes when one fails: seconds in which another one can report its error first.
_LET_SPEAK = 1.0
_OUT_OF_MEMORY = {
    "host": "out of memory; use fewer --workers or a machine with more memory, and run the same command to continue",
    "device": "out of memory on the device; free some there and run the same command to continue, or use --device cpu",
}


class DefaultGroup(click.Group):
    """A group whose first word may also be the argument of its default command: `svdconvert MODEL --rank 768`."""

    command_class = GroupedCommand

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        if args[:1] == ["help"] and not Path("help").exists():
            args = self._help_of(args[1:2])
        if args and args[0] not in self.commands and args[0] not in own:
            close = difflib.get_close_matches(args[0], self.commands, cutoff=0.7)
            # While a shell completes a line, nothing in it is an error yet.
            if close and not ctx.resilient_parsing and not Path(args[0]).exists():
                raise InputError(f"there is no command {args[0]!r}; did you mean {close[0]!r}?")
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)

    def _help_of(self, names: list[str]) -> list[str]:
        """Arguments that show the help of a command, or of the program.

        Raises:
            InputError: there is no such command, and none with a similar name.
        """
        name = names[0] if names and not names[0].startswith("-") else None
        if name and name not in self.commands and not difflib.get_close_matches(name, self.commands, cutoff=0.7):
            raise InputError(f"there is no command {name!r}; `svdconvert help` lists them")
        return [*names, "--help"]

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completions of a first word: a command, or an argument of the default command."""
        found = super().shell_complete(ctx, incomplete)
        default = self.commands[DEFAULT_COMMAND]
        with default.make_context(DEFAULT_COMMAND, [], parent=ctx, resilient_parsing=True) as inner:
            if incomplete.startswith("-"):
                known = {item.value for item in found}
                own = default.shell_complete(inner, incomplete)
                return [*found, *(item for item in own if item.value not in known)]
            return [*found, *default.params[0].shell_complete(inner, incomplete)]

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
            # click itself would only print "Aborted!".
            raise JobError(interrupts.SENTENCE) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        # OpenMP's threads spin while they wait for each other; where other processes use the cores, an
        # eigen-decomposition then takes up to ten times as long (docs/measurements-threads.md). OpenMP reads the
        # variable when torch is loaded.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if processes.launched_rank() > 0:
            # One process prints for all.
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        try:
            return super().main(*args, **kwargs)
        except SvdconvertError as error:
            if os.environ.get("SVDCONVERT_DEBUG"):
                traceback.print_exception(error)
            _fail(told(error.sentence), error.exit_code)
        except Exception as error:
            if where := out_of_memory(error):
                _fail(_OUT_OF_MEMORY[where], 1)
            if os.environ.get("SVDCONVERT_DEBUG"):
                raise
            _fail(_unforeseen(error), 1)
        except SystemExit as end:
            if end.code and processes.launched_rank() > 0:
                time.sleep(_LET_SPEAK)
            raise
        finally:
            if processes.launched_rank() > 0:
                sys.stderr = sys.__stderr__  # every process may print a traceback


def _unforeseen(error: Exception) -> str:
    """The message for an unforeseen error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".rstrip(": ")
    return (
        f"svdconvert failed unexpectedly ({reason[:200]}, {Path(last.filename).name} line {last.lineno}); please "
        "report it with the command and what SVDCONVERT_DEBUG=1 adds"
    )


def _fail(message: str, exit_code: int) -> NoReturn:
    message = printable(message, None)
    if len(message) > _LONGEST:  # a name in it; what is wrong stands first, and what to do last
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 4 :]}"
    interrupts.settle()
    group = processes.current()
    if group.size == 1:
        click.echo(f"Error: {message}", err=True)
    elif group.claim_error():
        click.echo(f"Error: {message}", file=sys.__stderr__)
    else:
        time.sleep(_LET_SPEAK)
    sys.exit(exit_code)


@click.group(cls=DefaultGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def main() -> None:
    """Make a Hugging Face language model a fraction of its size by low-rank factorization.

    \b
    svdconvert polyglot-ko-3.8b --rank 768 --out DIR
    is short for `svdconvert convert ...`; the result loads with
    AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).
    """

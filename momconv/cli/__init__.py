"""The command line. Each command is one function in one module and imports torch only when it runs.

A command joins with one import and one line: ``app.command("eval")(guarded(eval.evaluate))``.
"""

import gc
import os
import signal
import sys
import warnings
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

from momconv._version import __version__
from momconv.allocator import start_again
from momconv.cli import (
    convert,
    demo,
    doctor,
    export,
    finetune,
    inspect,
    models,
    predict,
    profile_memory,
    push,
    recipes,
)
from momconv.cli import eval as eval_
from momconv.cli._console import Terminated, configure, guarded, out, show_warning
from momconv.cli._group import Commands
from momconv.exhaustion import keep_reserve

EXIT_CODES = (
    "Exit codes: 0 done · 1 failed · 2 usage or recipe · 3 images · 4 model file · "
    "5 memory, disk, device or network · 6 threshold not met · 130 interrupted · 143 terminated"
)


app = typer.Typer(
    name="momconv",
    cls=Commands,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EXIT_CODES,
)


def _print_version(wanted: bool) -> None:  # noqa: FBT001 (Typer calls it)
    if wanted:
        out.print(f"momconv {__version__}")
        raise typer.Exit


@app.callback()
@guarded
def momconv(  # noqa: PLR0913 (one for each option)
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No notes and no progress on stderr.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also what libraries log, on stderr.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Download nothing, as with MOMCONV_OFFLINE=1.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    log_every: Annotated[
        str,
        typer.Option(metavar="TIME", help="Between lines of progress, where there is no terminal."),
    ] = "30s",
    log_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Add what is told on stderr, with the time, to this."),
    ] = None,
) -> None:
    """Fine-tune pretrained residual networks in less memory, with invertible momentum blocks."""
    configure(quiet=quiet, verbose=verbose, debug=debug, log_file=log_file, log_every=log_every)
    if offline:
        os.environ["MOMCONV_OFFLINE"] = "1"


app.command("convert")(guarded(convert.convert))
app.command("finetune")(guarded(finetune.finetune))
app.command("eval")(guarded(eval_.evaluate))
app.command("predict")(guarded(predict.predict))
app.command("inspect")(guarded(inspect.inspect))
app.command("export")(guarded(export.export))
app.command("push")(guarded(push.push))
app.command("profile-memory")(guarded(profile_memory.profile_memory))
app.command("doctor")(guarded(doctor.doctor))
app.command("models")(guarded(models.models))
app.command("demo")(guarded(demo.demo))
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Run the command line, on a terminal of any encoding."""
    # Threads that wait by spinning are up to 10 times slower where anything else is running.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    start_again(sys.argv[1:])
    # PyTorch brings half a million objects that stay: to look through them for garbage again and
    # again while they are made takes longer than a tenth of a start.
    gc.set_threshold(10_000)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = show_warning  # type: ignore[assignment]
    signal.signal(signal.SIGTERM, _quit)
    keep_reserve()
    app()


def _quit(number: int, _frame: object) -> None:
    """End as Ctrl-C does, with the processes that read images."""
    raise Terminated(128 + number)

"""What every command shares: two consoles, one way to fail, JSON, and progress.

Results go to ``out`` (stdout); notes, warnings, errors and progress go to ``err`` (stderr).
"""

import functools
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ParamSpec

import typer
from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from momconv.errors import MomconvError, ResourceError, UncheckedFile
from momconv.exhaustion import explain, is_exhaustion, release_reserve
from momconv.files.cache import cache_folder
from momconv.names import encode_name
from momconv.opening import find_model_file, open_at_once
from momconv.units import format_duration, parse_duration, parse_path
from momconv.words import abridge, fit_screen, printable

P = ParamSpec("P")

_NAMES_OR_FILES = ("model", "network", "weights")  # options that take either
_MODEL_FILES = ("file", "back", "compare")  # that may be the folder of a run instead
_LONGEST_BAR = 40  # characters
_UNBOUNDED = 10**6  # characters of a line, where no terminal has to wrap it


def _console(*, stderr: bool) -> Console:
    # Without force_terminal=False, rich still writes bold and dim where it takes CI for a terminal.
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
    stream = sys.stderr if stderr else sys.stdout
    return Console(
        stderr=stderr,
        width=None if stream.isatty() else _UNBOUNDED,
        emoji=False,
        highlight=False,
        no_color=plain or None,
        force_terminal=False if plain else None,
    )


out = _console(stderr=False)
err = _console(stderr=True)


@dataclass(slots=True)
class _Settings:
    quiet: bool = False
    debug: bool = False
    log_file: Path | None = None
    seconds_between_lines: float = 30  # of progress, where there is no terminal


_settings = _Settings()


def configure(
    *, quiet: bool, verbose: bool, debug: bool, log_file: Path | None, log_every: str = "30s"
) -> None:
    """Set what the options before a command ask for.

    Raises:
        UsageError: ``log_every`` is no duration.
        ResourceError: The log file cannot be written.
    """
    _settings.quiet, _settings.debug, _settings.log_file = quiet, debug, None
    _settings.seconds_between_lines = parse_duration(log_every, "--log-every")
    if verbose:
        logging.basicConfig(level=logging.INFO, handlers=[_Notes()])
    if log_file is None:
        return
    try:
        open(log_file, "a", opener=open_at_once).close()
    except OSError as error:
        raise ResourceError(
            f"cannot write the log file {log_file}: {error.strerror}",
            kind="output.unwritable",
            fix="--log-file FILE",
        ) from error
    _settings.log_file = log_file


def show(text: Text, *, minor: bool = True) -> None:
    """Print a line on stderr, unless it is ``minor`` and quiet is wanted; it is always logged."""
    if not (minor and _settings.quiet):
        err.print(text, soft_wrap=True)
    if _settings.log_file:
        stamp = datetime.now().astimezone().isoformat(timespec="seconds")
        # A disk that is full is told of by what needs it.
        with (
            suppress(OSError),
            open(
                *(_settings.log_file, "a"),
                encoding="utf-8",
                errors="backslashreplace",
                opener=open_at_once,
            ) as file,
        ):
            file.write(f"{stamp} {text.plain}\n")


def note(text: str) -> None:
    """Tell the user something that needs no action."""
    _say("note", text, "cyan")


def warn(text: str) -> None:
    """Tell the user something that may be wrong."""
    _say("warning", text, "yellow")


class _Notes(logging.Handler):
    """Tells what libraries log."""

    def emit(self, record: logging.LogRecord) -> None:
        note(f"{record.name}: {record.getMessage()}")


def show_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    """Tell a warning of Python's on one line; for ``warnings.showwarning``."""
    text = " ".join(str(message).split())
    if issubclass(category, UncheckedFile):
        note(text)
    else:
        warn(f"{text} ({category.__name__})")


def tell(text: str) -> None:
    """Pass on a message of the library, which begins with ``note:`` or ``warning:``."""
    label, _, rest = text.partition(": ")
    (warn if label == "warning" else note)(rest)


def print_json(document: object) -> None:
    """Print ``document`` on stdout; numbers that JSON does not have (NaN, Infinity) become null."""
    out.print(Text(json.dumps(_finite(document), indent=2)), soft_wrap=True)


def print_json_lines(documents: Iterable[object]) -> None:
    """Print documents like ``print_json``, each on a line of its own."""
    for document in documents:
        out.print(Text(json.dumps(_finite(document))), soft_wrap=True)


def _finite(document: object) -> Any:
    return json.loads(json.dumps(document, default=_name), parse_constant=lambda _: None)


def _name(value: object) -> str:
    return encode_name(str(value))


class Terminated(SystemExit):
    """SIGTERM came: to the program's parts the end, as other exits are."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Return ``command``, ending in one readable error and its code instead of a traceback.

    If it was called with ``json_output=True``, the error is a JSON document on stdout instead. In
    all paths that it is given ``~`` is the home folder.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **{name: _expand(name, value) for name, value in kwargs.items()})
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except BrokenPipeError:
            out.on_broken_pipe()
        except (Exception, KeyboardInterrupt, Terminated) as error:
            raise typer.Exit(fail(error, as_json=bool(kwargs.get("json_output")))) from None

    return run


def fail(error: BaseException, *, as_json: bool) -> int:
    """Tell what went wrong, in JSON on stdout if so wanted, and return the code to exit with."""
    failure = _failure(error)
    if _settings.debug or os.environ.get("MOMCONV_DEBUG"):
        show(Text(traceback.format_exc()), minor=False)
    failure.report(as_json=as_json)
    return failure.code


def _expand(name: str, value: Any) -> Any:
    """Return the ``value`` of an option or argument, without ``~`` where it is a path.

    Where a model is wanted, the folder of a run is the best one in it.
    """
    if isinstance(value, list):
        return [_expand(name, part) for part in value]
    if isinstance(value, Path):
        path = parse_path(value)
        return find_model_file(path) if name in _MODEL_FILES else path
    if name in _NAMES_OR_FILES and value is not None:
        parse_path(value)
        return os.path.expanduser(value)
    return value


@dataclass(frozen=True, slots=True)
class _Failure:
    label: str
    code: int
    kind: str
    message: str
    hints: list[str]

    def report(self, *, as_json: bool) -> None:
        if as_json:
            print_json({"ok": False, "error": self.to_json()})
            return
        _say(self.label, self.message, "bold red")
        for hint in self.hints:
            _say("fix", hint, "green")

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("code", "kind", "message", "hints")}


def describe_error(error: MomconvError) -> dict[str, Any]:
    """Return what a JSON document says of an ``error``, of a command that prints results too."""
    return _failure(error).to_json()


def _failure(error: BaseException) -> _Failure:
    if is_exhaustion(error):
        release_reserve()
        error = explain(error)
    if isinstance(error, MomconvError):
        hints = (error.fix or "").splitlines()
        return _Failure("error", error.exit_code, error.kind, error.message, hints)
    if isinstance(error, Terminated):
        return _Failure("error", 143, "terminated", "terminated", [])
    if isinstance(error, KeyboardInterrupt):
        return _Failure("error", 130, "interrupted", "interrupted", [])
    summary = " ".join("".join(traceback.format_exception_only(error)).split())
    message = f"{abridge(summary, 1000)} (momconv --debug COMMAND shows where{_keep_traceback()})"
    return _Failure("internal error", 1, "internal", message, [])


def _keep_traceback() -> str:
    """Write the traceback to a file, and return a sentence that names it, for a report."""
    path = cache_folder() / "crash.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback.format_exc(), encoding="utf-8", errors="backslashreplace")
    except OSError:
        return ""
    return f", and so does {path}"


def _say(label: str, text: str, style: str) -> None:
    """Print ``label: text`` on stderr: unwrapped, with control characters made visible."""
    visible = "\n".join(map(printable, fit_screen(text).split("\n")))
    show(Text.assemble((f"{label}: ", style), visible), minor=label == "note")


Report = Callable[[int, str], None]


@contextmanager
def progress(
    title: str, total: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Report]:
    """Show how far ``title`` is, each time ``report(done, text)`` is called.

    On a terminal this is a bar that goes away at the end; elsewhere a plain line now and then.
    """
    if _settings.quiet or not err.is_terminal:
        yield _plain_lines(title, total, clock)
        return
    with Progress(_Line(), console=err, transient=True) as bar:
        task = bar.add_task(title, total=total, text="", visible=False)
        yield lambda done, text: bar.update(task, completed=done, text=text, visible=True)


class _Line(ProgressColumn):
    """Epoch, count and time left, never cut; then a bar, where there is room, and the rest."""

    def render(self, task: Task) -> Table:
        """Return the line in the width of the terminal."""
        text = str(task.fields["text"])
        epoch, _, rest = text.partition(" · ") if text.startswith("epoch") else ("", "", text)
        left = "-:--:--" if task.time_remaining is None else _clock(task.time_remaining)
        head = f"{task.completed:.0f}/{task.total:.0f} · {left} left"
        head = f"{epoch} · {head}" if epoch else head
        if len(task.description) + len(head) + 1 < err.width:
            head = f"{task.description} {head}"
        room = err.width - len(head) - 1
        details = Text(rest, no_wrap=True)
        details.truncate(max(0, room - 1), overflow="ellipsis")
        width = min(_LONGEST_BAR, room - len(details) - 2)
        line = Table.grid(padding=(0, 1, 0, 0))
        bar = [ProgressBar(task.total or 1, task.completed, width)] if width > 0 else []
        said = [details] if details else []  # an empty column would take one from the first
        line.add_row(Text(head, no_wrap=True), *bar, *said)
        return line


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _plain_lines(title: str, total: int, clock: Callable[[], float]) -> Report:
    began = printed = clock()

    def report(done: int, text: str) -> None:
        nonlocal printed
        now = clock()
        if now - printed < _settings.seconds_between_lines:
            return
        printed = now
        left = format_duration((now - began) * (total - done) / done) if done else "unknown"
        show(Text(f"{title} {done}/{total}, {left} left {text}".rstrip()))

    return report

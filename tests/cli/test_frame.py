import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from momconv import cli
from momconv._version import __version__
from momconv.cli import _console, app
from momconv.cli._console import configure, guarded, note, print_json, progress, warn
from momconv.errors import DataError, InversionError, ModelFileError, ResourceError, UsageError

COMMANDS = [str(command.name) for command in app.registered_commands]


def python(code: str, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a process of its own, from the root of the repository."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | variables,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )


def fail(error: BaseException, *, json_output: bool = False) -> int:
    """Run a guarded command that raises ``error``; the code that it exits with."""

    @guarded
    def command(*, json_output: bool) -> None:
        raise error

    with pytest.raises(typer.Exit) as exit_:
        command(json_output=json_output)
    return exit_.value.exit_code


def test_nothing_is_wrapped_or_cut_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words, stream = [" ".join("x" * 300), "y" * 3000], io.StringIO()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys, "stdout", stream)
    table = Table("long", "longer", box=None)
    table.add_row(*words)
    console = _console._console(stderr=False)
    console.print(table)
    console.print(words[0])
    assert [line.split() for line in stream.getvalue().splitlines()] == [
        ["long", "longer"],
        [*words[0].split(), words[1]],
        words[0].split(),
    ]


# The program


@pytest.mark.parametrize(
    "args", [[], ["--help"], ["--version"], *([c, "--help"] for c in COMMANDS)]
)
def test_help_and_version_answer_without_torch(args: list[str]) -> None:
    code = """if True:
        import sys
        from momconv.cli import main
        try:
            main()
        finally:
            if "torch" in sys.modules:
                sys.exit("torch was imported")
    """
    ran = python(code, *args)
    assert ran.stdout
    assert ran.returncode == (0 if args else 2)


def test_the_version_is_the_package_s() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"momconv {__version__}\n"


def test_help_names_the_exit_codes() -> None:
    shown = " ".join(CliRunner().invoke(app, ["--help"]).output.split())
    assert "0 done · 1 failed · 2 usage or recipe · 3 images · 4 model file" in shown


@pytest.mark.parametrize("args", [["--nope"], ["nope"]])
def test_a_wrong_command_line_is_a_usage_error(args: list[str]) -> None:
    assert CliRunner().invoke(app, args).exit_code == 2


def test_python_m_momconv_is_momconv() -> None:
    ran = python("import runpy; runpy.run_module('momconv', run_name='__main__')", "--version")
    assert (ran.returncode, ran.stdout) == (0, f"momconv {__version__}\n")


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    ran = python("from momconv.cli import main; main()", "--help", PYTHONIOENCODING="ascii")
    assert ran.returncode == 0
    assert r"0 done \xb7 1 failed" in ran.stdout


# Failing


def test_a_guarded_command_keeps_its_options_and_its_exit_code() -> None:
    def command(path: str, *, epochs: Annotated[int, typer.Option()] = 3) -> None:
        raise DataError(f"no images in {path} for {epochs} epochs", kind="data.empty")

    one = typer.Typer()
    one.command()(guarded(command))
    ran = CliRunner().invoke(one, ["here", "--epochs", "5"])
    assert (ran.exit_code, ran.output) == (3, "error: no images in here for 5 epochs\n")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InversionError("x", kind="k"), 1),
        (UsageError("x", kind="k"), 2),
        (DataError("x", kind="k"), 3),
        (ModelFileError("x", kind="k"), 4),
        (ResourceError("x", kind="k"), 5),
        (MemoryError(), 5),
        (RuntimeError("could not create a primitive"), 5),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("x"), 1),
    ],
)
@pytest.mark.parametrize("json_output", [True, False])
def test_every_failure_has_its_exit_code(
    capsys: pytest.CaptureFixture[str], error: BaseException, code: int, json_output: bool
) -> None:
    assert fail(error, json_output=json_output) == code
    printed = capsys.readouterr()
    assert bool(printed.out) is json_output
    assert bool(printed.err) is not json_output


def test_an_error_is_printed_unwrapped_on_stderr_with_its_fixes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = "/folder" * 40 + "/[bold]a:smile:.png"
    fail(DataError(f"cannot read {path}\nit is empty", kind="data.bad", fix=f"rm {path}\nmkdir x"))
    printed = capsys.readouterr()
    lines = [f"error: cannot read {path}", "it is empty", f"fix: rm {path}", "fix: mkdir x"]
    assert printed.err.splitlines() == lines
    assert printed.out == ""


def test_control_characters_in_an_error_are_made_visible(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail(DataError("a\x1b[31mb\rc\td\u202e\x9b\udce9é ", kind="data.bad"))
    assert capsys.readouterr().err == r"error: a\x1b[31mb\rc\td\u202e\x9b\xe9é " + "\n"


def test_with_json_an_error_is_one_document_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    error = DataError("empty: é\x1b", kind="data.empty", fix="add images\nor not")
    assert fail(error, json_output=True) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "ok": False,
        "error": {
            "code": 3,
            "kind": "data.empty",
            "message": "empty: é\x1b",
            "hints": ["add images", "or not"],
        },
    }
    assert "\x1b" not in printed.out
    assert printed.err == ""


def test_a_bug_of_ours_is_one_line_that_says_how_to_see_more(
    capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    assert fail(ZeroDivisionError("division\nby zero")) == 1
    expected = "internal error: ZeroDivisionError: division by zero"
    kept = cache / "crash.log"
    where = f"(momconv --debug COMMAND shows where, and so does {kept})"
    assert capsys.readouterr().err == f"{expected} {where}\n"
    assert kept.read_text().startswith("Traceback (most recent call last):\n")


@pytest.mark.parametrize("json_output", [True, False])
def test_the_traceback_is_shown_on_request(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, json_output: bool
) -> None:
    monkeypatch.setenv("MOMCONV_DEBUG", "1")
    fail(DataError("empty", kind="data.empty"), json_output=json_output)
    printed = capsys.readouterr()
    assert printed.err.startswith("Traceback (most recent call last):\n")
    assert ", in command\n" in printed.err
    assert "Traceback" not in printed.out


@pytest.fixture
def usual() -> Iterator[None]:
    """What the options before a command change is changed back."""
    yield
    configure(quiet=False, verbose=False, debug=False, log_file=None)


@pytest.mark.usefixtures("usual")
def test_quiet_leaves_warnings_and_errors_and_a_log_file_has_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    configure(quiet=True, verbose=False, debug=False, log_file=tmp_path / "log")
    note("of no importance")
    warn("two\nlines\x1b[31m")
    with progress("training", 8) as report:
        report(4, "")
    fail(DataError("no images", kind="data.empty", fix="another folder"))
    configure(quiet=False, verbose=False, debug=False, log_file=None)
    expected = ["warning: two", "lines\\x1b[31m", "error: no images", "fix: another folder"]
    assert capsys.readouterr().err.splitlines() == expected
    logged = (tmp_path / "log").read_text().splitlines()
    assert [line.partition(" ")[2] or line for line in logged] == [
        *("note: of no importance", "warning: two", "lines\\x1b[31m", "error: no images"),
        "fix: another folder",
    ]
    assert datetime.fromisoformat(logged[0].partition(" ")[0]).tzinfo is not None


@pytest.mark.usefixtures("usual")
def test_the_options_before_a_command(tmp_path: Path) -> None:
    options = ["-q", "--debug", "--log-file", str(tmp_path / "log")]
    ran = CliRunner().invoke(app, [*options, "recipes", "show", "nope"])
    assert ran.exit_code == 2
    assert ran.stderr.startswith("Traceback")
    assert "error: no recipe 'nope' comes" in (tmp_path / "log").read_text()
    ran = CliRunner().invoke(app, ["--log-file", str(tmp_path / "no" / "log"), "models"])
    assert ran.exit_code == 5
    assert ran.stderr.startswith("error: cannot write the log file ")


@pytest.mark.parametrize("passed", [typer.Exit(6), typer.Abort(), typer.BadParameter("no")])
def test_what_typer_handles_is_left_to_typer(
    capsys: pytest.CaptureFixture[str], passed: Exception
) -> None:
    @guarded
    def command() -> None:
        raise passed

    with pytest.raises(type(passed)) as left:
        command()
    assert left.value is passed
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("write", ["print_json(list(range(10**5)))", "print('x' * 10**6)"])
def test_a_reader_that_has_gone_is_no_error(write: str) -> None:
    code = f"""if True:
        import os
        from momconv.cli._console import guarded, print_json
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        guarded(lambda: {write})()
    """
    ran = python(code)
    assert (ran.returncode, ran.stderr) == (1, "")


# Telling


def test_what_libraries_say_is_told_on_one_line_each() -> None:
    code = """if True:
        import logging, warnings
        from momconv import cli
        def say():
            warnings.warn("two\\nlines", UserWarning)
            cli.momconv(verbose=True)
            logging.getLogger("timm").info("loading")
        cli.app = say
        cli.main()
    """
    ran = python(code)
    lines = ["warning: two lines (UserWarning)", "note: timm: loading"]
    assert (ran.returncode, ran.stdout, ran.stderr.splitlines()) == (0, "", lines)


def test_offline_is_told_to_all_that_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOMCONV_OFFLINE", "0")
    assert CliRunner().invoke(app, ["--offline", "recipes", "ls"]).exit_code == 0
    assert os.environ["MOMCONV_OFFLINE"] == "1"


def test_notes_and_warnings_go_to_stderr_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    note("5 images [in a]")
    warn("1 image is gone")
    assert capsys.readouterr() == ("", "note: 5 images [in a]\nwarning: 1 image is gone\n")


def test_json_has_no_numbers_that_json_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": float("nan"), "b": [float("inf"), 1.5], "path": Path("x"), "[i]": "y" * 99})
    document = capsys.readouterr().out
    assert json.loads(document, parse_constant=pytest.fail) == {
        "a": None,
        "b": [None, 1.5],
        "path": "x",
        "[i]": "y" * 99,
    }


@pytest.mark.parametrize(
    ("variables", "coloured"),
    [
        ({"TERM": "xterm"}, True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False),
        ({"TERM": "dumb"}, False),
    ],
)
def test_colour_can_be_refused_even_where_it_is_forced(
    variables: dict[str, str], coloured: bool
) -> None:
    code = "from momconv.cli._console import err, warn; warn('x'); err.print('x', style='bold')"
    ran = python(code, FORCE_COLOR="1", GITHUB_ACTIONS="1", **({"NO_COLOR": ""} | variables))
    assert ("\x1b" in ran.stderr) is coloured


def ticking(*seconds: float) -> Callable[[], float]:
    return iter(seconds).__next__


def test_progress_off_a_terminal_is_a_line_every_30_seconds(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress("training", 8, clock=ticking(0, 1, 31, 60.9, 61)) as report:
        report(1, "loss 2.0")
        report(2, "loss [1.9]")
        report(3, "loss 1.8")
        report(4, "")
    assert capsys.readouterr() == (
        "",
        "training 2/8, 1 min 33 s left loss [1.9]\ntraining 4/8, 1 min 1 s left\n",
    )


@pytest.mark.usefixtures("usual")
def test_how_often_progress_is_told_can_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    configure(quiet=False, verbose=False, debug=False, log_file=None, log_every="2min")
    with progress("training", 8, clock=ticking(0, 119, 121)) as report:
        report(1, "")
        report(2, "")
    assert capsys.readouterr().err.startswith("training 2/8, ")
    assert CliRunner().invoke(app, ["--log-every", "often", "recipes", "ls"]).exit_code == 2


def test_progress_before_anything_is_done_does_not_guess(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress("reading", 8, clock=ticking(0, 31)) as report:
        report(0, "")
    assert capsys.readouterr().err == "reading 0/8, unknown left\n"


def test_progress_on_a_terminal_is_a_bar_that_leaves_stdout_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Console(stderr=True, force_terminal=True, width=100)
    monkeypatch.setattr(_console, "err", terminal)
    with progress("training", 8) as report:
        report(4, "loss [1.9]")
        _console.out.print("a result")
    printed = capsys.readouterr()
    assert printed.out == "a result\n"
    assert "4/8" in printed.err
    assert "loss [1.9]" in printed.err


def test_sigterm_ends_any_command_as_ctrl_c_does(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "app", lambda: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143

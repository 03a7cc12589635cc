"""Every command and every line of Python in the README works, in the README's order."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from momconv.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
# The first use of a command is run as a program, unless tests of the command do that already. The
# others are run in this process, which is faster.
TRIED = {"convert", "eval", "finetune", "profile-memory"}
FIRST = {line.split()[1]: line for line in reversed(COMMANDS)}
PROGRAMS = {line for name, line in FIRST.items() if name not in TRIED}
# The demo in little: with fewer images, and an epoch of each training.
BRIEFLY = """
from momconv import demo
from momconv.cli import main

demo.demonstrate.__kwdefaults__.update(images=200, epochs=(1, 1))
main()
"""
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[1] for line in COMMANDS}

    known = {command.name or "" for command in app.registered_commands}
    assert shown == {*known, "recipes"}


@pytest.mark.timeout(600)
@pytest.mark.usefixtures("one_core")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)

    code, out, err = (run_program if command in PROGRAMS else run_here)(command, monkeypatch)

    assert code == 0, err
    assert out


def run_program(command: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    if command.startswith("momconv demo"):
        command = shlex.join([sys.executable, "-c", BRIEFLY, *shlex.split(command)[1:]])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def one_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one, the images are read in this process, which has threads: no forks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)


def run_here(command: str, _monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, str]:
    program, *words = shlex.split(command)
    assert program == "momconv"
    done = CliRunner().invoke(app, words)
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.usefixtures("one_core")
def test_the_python_of_the_readme_works(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)

    exec(compile(PYTHON, "README.md", "exec"), {"__name__": "__main__"})

    assert (folder / "converted.safetensors").is_file()

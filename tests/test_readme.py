"""Every command and every line of Python in the README works, in the README's order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from momconv.cli import app

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
(PYTHON,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def test_the_readme_shows_every_command() -> None:
    shown = {line.split()[1] for line in COMMANDS}

    known = {command.name or "" for command in app.registered_commands}
    assert shown == {*known - {"models"}, "recipes"}  # listing the models takes minutes


@pytest.mark.timeout(600)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(command: str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    done = subprocess.run(
        command, shell=True, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True
    )

    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout


def test_the_python_of_the_readme_works(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PYTHON], cwd=folder, capture_output=True)

    assert done.returncode == 0, done.stderr.decode()
    assert (folder / "converted.safetensors").is_file()

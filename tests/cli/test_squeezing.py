"""Commands that are left with hardly any memory from some moment on, as by ``ulimit -v``."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from momconv.cli import app
from momconv.files import model_file
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import build

# As soon as the command opens a file of this name, or puts one in its place, its address space is
# limited to what it has then, and more.
SCRIPT = """
import os, resource, sys
from momconv.cli import main

name, more = sys.argv.pop(1), int(sys.argv.pop(1))

def limit(event, arguments):
    global name
    path = {"open": 0, "os.rename": 1}.get(event)
    path = None if path is None else arguments[path]
    if name and isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(name):
        name = ""
        size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + more, size + more))

sys.addaudithook(limit)
main()
"""


def squeeze(name: str, more: int, *args: object) -> subprocess.CompletedProcess[str]:
    """Run momconv, which has no more than ``more`` bytes left once it opens a file ``name``."""
    command = [sys.executable, "-c", SCRIPT, name, str(more), *map(str, args)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MOMCONV_ALLOCATOR": "system"},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_run_without_memory_ends_with_5_and_a_fix_and_goes_on_with_some(
    colours: Path, tmp_path: Path
) -> None:
    run, options = tmp_path / "run", ["--epochs", "2", "--batch-size", "5", "--workers", "0"]
    args = ["finetune", "--data", colours, "--model", "cifar_resnet20", "--weights", "none"]
    args += ["--resolution", "128"]  # so that no image fits where something else was before
    ran = squeeze("state.safetensors", 2**22, *args, *options, "-o", run)
    assert ran.returncode == 5, ran.stderr
    assert "ran out of memory" in ran.stderr
    assert f"fix: momconv finetune --resume {run}" in ran.stderr
    again = CliRunner().invoke(app, ["finetune", "--resume", str(run)])
    assert again.exit_code == 0, again.stderr
    assert len((run / "metrics.csv").read_text().splitlines()) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_an_evaluation_without_memory_ends_with_5(colours: Path, tmp_path: Path) -> None:
    model, file = build("cifar_resnet20", 3), tmp_path / "model.safetensors"
    description = describe(model)
    large = description.preprocessing.at(512)  # as above
    attach(model, replace(description, preprocessing=large))
    model_file.save(model, file)
    ran = squeeze("red/7.png", 0, "eval", file, "--data", colours, "--workers", "0")
    assert ran.returncode == 5, ran.stderr
    assert "error: memory ran out\n" in ran.stderr
    assert "fix: ulimit -v unlimited" in ran.stderr

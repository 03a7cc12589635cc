"""A process starts again with a quicker allocator where there is one, and once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from momconv import allocator
from momconv.allocator import ALLOCATORS, find_allocator, start_again


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, str]]:
    """The environments with which the process would start again, on a machine with tcmalloc."""
    library = tmp_path / "lib" / "x86_64-linux-gnu" / ALLOCATORS[1].file
    library.parent.mkdir(parents=True)
    library.touch()
    environments: list[dict[str, str]] = []
    monkeypatch.setattr(os, "execve", lambda _file, _words, env: environments.append(env))
    monkeypatch.setattr(allocator, "find_allocator", lambda: find_allocator([tmp_path]))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.delenv("MOMCONV_ALLOCATOR", raising=False)
    return environments


def test_the_best_is_taken(tmp_path: Path, started: list[dict[str, str]]) -> None:
    start_again(["-q", "finetune", "photos"])
    (environment,) = started
    assert environment["LD_PRELOAD"].endswith("tcmalloc_minimal.so.4")
    better = tmp_path / "lib64" / ALLOCATORS[0].file
    better.parent.mkdir()
    better.touch()
    start_again(["eval"])
    assert started[1]["LD_PRELOAD"] == str(better)
    assert started[1]["MALLOC_CONF"] == ALLOCATORS[0].settings["MALLOC_CONF"]


@pytest.mark.parametrize(
    ("words", "variables"),
    [
        (["models"], {}),
        (["finetune"], {"LD_PRELOAD": "mine.so"}),
        (["finetune"], {"MOMCONV_ALLOCATOR": "system"}),
    ],
)
def test_it_is_left_alone(
    words: list[str],
    variables: dict[str, str],
    started: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    start_again(words)
    assert started == []


@pytest.mark.skipif(find_allocator() is None, reason="no quicker allocator on this machine")
def test_a_command_that_computes_has_it_and_its_options() -> None:
    program = (
        "import os, sys; from momconv.allocator import start_again; start_again(['eval']); "
        "print(os.environ['LD_PRELOAD'], sys.argv[1:])"
    )
    found = find_allocator()
    assert found
    names = ("LD_PRELOAD", "MOMCONV_ALLOCATOR")
    ran = subprocess.run(
        [sys.executable, "-c", program, "a b", "--c"],
        env={name: v for name, v in os.environ.items() if name not in names},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout == f"{found[1]} ['a b', '--c']\n"


STEPS = """
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for step in range(4):
    blocks = [ctypes.c_void_p(libc.malloc(512 << 10)) for _ in range(400)]
    for block in blocks:
        ctypes.memset(block, 1, 512 << 10)
    for block in blocks:
        libc.free(block)
    print(open("/proc/self/statm").read().split()[1])
"""


@pytest.mark.skipif(find_allocator() is None, reason="no quicker allocator on this machine")
def test_steps_of_a_deep_network_take_the_same_memory_again_and_again() -> None:
    found = find_allocator()
    assert found
    allocator, library = found
    ran = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=os.environ | allocator.settings | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, *_, last = map(int, ran.stdout.split())
    assert last < 1.1 * first

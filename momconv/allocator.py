"""A quicker allocator than glibc's, where the machine has one.

glibc gives large blocks back to the system, and for the next activation gets them page by page,
each cleared: half of a training step on photographs. jemalloc and tcmalloc keep them, in less
memory. Who allocates has to be known when a process starts, so the command line starts itself
again, once.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_FOLDERS = ("lib/*-linux-gnu", "lib64", "lib")  # of libraries, below each prefix
_PREFIXES = (Path(sys.prefix), Path("/usr/local"), Path("/usr"), Path("/"))
_SWITCH = "MOMCONV_ALLOCATOR"  # "system" keeps glibc's
_PRELOAD = "LD_PRELOAD"
_COMPUTING = {"convert", "demo", "eval", "finetune", "predict"}  # commands


@dataclass(frozen=True, slots=True)
class Allocator:
    """An allocator, and how it is told to keep what is freed."""

    name: str
    file: str  # its library
    package: str  # of Debian and its kin
    settings: Mapping[str, str] = field(default_factory=dict)  # variables of the environment


# jemalloc is to keep what is freed, and to take the next block from it however large it is: else
# the activations of a deep network, freed one after the other, become a piece that nothing may
# have a part of, and each step takes as much again from the system.
_KEEPING = {"MALLOC_CONF": "dirty_decay_ms:-1,lg_extent_max_active_fit:40"}

ALLOCATORS = (  # the best first
    Allocator("jemalloc", "libjemalloc.so.2", "libjemalloc2", _KEEPING),
    Allocator("tcmalloc", "libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"),
)


def find_allocator(
    prefixes: Sequence[Path] = _PREFIXES,
) -> tuple[Allocator, Path] | None:
    """Return the best allocator that is installed, and its library."""
    for allocator in ALLOCATORS:
        for prefix in prefixes:
            for folder in _FOLDERS:
                if found := next(prefix.glob(f"{folder}/{allocator.file}"), None):
                    return allocator, found
    return None


def start_again(words: Sequence[str]) -> None:
    """Start this process again with a quicker allocator, if a command of ``words`` computes.

    Nothing happens where there is none, where something is preloaded already, and where
    ``MOMCONV_ALLOCATOR`` is "system".
    """
    is_wanted = os.environ.get(_SWITCH) != "system" and _PRELOAD not in os.environ
    if sys.platform != "linux" or not is_wanted or not _COMPUTING.intersection(words):
        return
    found = find_allocator()
    if found is None or "torch" in sys.modules or not Path(sys.executable).is_file():
        return
    allocator, library = found
    settings = {name: v for name, v in allocator.settings.items() if name not in os.environ}
    os.execve(
        sys.executable,
        [sys.executable, *sys.orig_argv[1:]],
        os.environ | settings | {_PRELOAD: str(library)},
    )

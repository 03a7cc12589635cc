import subprocess
import sys

import pytest

# In a process of its own, where each tensor is given back, as glibc does it at first.
SCRIPT = """
import ctypes, resource, sys, torch
from contextlib import nullcontext
from momconv.heap import keeping_freed_memory, returning_freed_memory

def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def resident_pages():
    return int(open("/proc/self/statm").read().split()[1])

ctypes.CDLL(None).mallopt(-3, 2**17)
ways = {"kept": keeping_freed_memory, "returned": returning_freed_memory}
with ways.get(sys.argv[1], nullcontext)(torch.device("cpu")):
    tensors = [torch.ones(2**18) for _ in range(128)]
    last = tensors[-1]
    full = resident_pages()
    del tensors
    gone = full - resident_pages()
    del last
    for _ in range(3):
        before = pages()
        tensors = [torch.ones(2**18) for _ in range(128)]
        taken = pages() - before
        held = resident_pages()
        del tensors
print(taken, held - resident_pages(), gone)
"""
PAGES = 128 * 2**20 // 4096


def run(how: str) -> list[int]:
    """Pages that the system provides for tensors in the place of others; that it has afterwards;
    and that it has once all but the last tensor are freed.
    """
    command = [sys.executable, "-c", SCRIPT, how]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [int(number) for number in output.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_freed_memory_is_used_again_and_given_back_in_the_end() -> None:
    taken, returned, gone = run("kept")

    assert taken < PAGES / 10 < run("as ever")[0]
    assert gone < PAGES / 10
    assert returned > PAGES / 2


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_freed_memory_is_given_back_although_what_came_later_is_alive() -> None:
    assert run("returned")[2] > PAGES / 2

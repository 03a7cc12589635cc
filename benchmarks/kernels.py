"""How fast a momentum step moves memory, compared with a copy of a tensor on the same device.

A step has to read and write each of its tensors once: x, v and y with 4 bytes an element, the last
byte of x and the remainder with 1. Those bytes over the time are its speed, and "of a copy" is that
over the speed of ``Tensor.copy_``. "fused" is one pass (momentum/faster/fused.py), "pieces" are
PyTorch's own operations, which take its place where Triton or Numba are missing. On a CPU a fused
step runs on half of PyTorch's threads (momentum/faster/fused_cpu.py), a copy on all of them, and
what returns a large tensor (advance, retreat) also waits for fresh pages of memory. Median times.
"""

from collections.abc import Callable
from unittest.mock import patch

import torch
import typer
from rich.console import Console

from benchmarks.tables import Log, Out, Row, choose_device, show
from momconv.momentum.equations import Rule, to_grid
from momconv.momentum.faster import fused, kernels
from momconv.momentum.measures import no_magnitudes
from momconv.momentum.storage import State

TITLE = "kernels"
KEY = ("elements", "operation", "way")
SIZES = (2**16, 2**20, 2**24)  # from a small block's output to a batch of ResNet-152's largest
RULE = Rule.of(0.9, (0.1,) * 8, 3, torch.float32)
# Bytes an element that are read and written.
MOVED = {"copy": 4 + 4, "advance": 14 + 10, "retreat": 9 + 5, "undo": 13 + 5}


def make_calls(size: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; the numbers do not matter to it."""
    x, y, out = (torch.randn(size, device=device) for _ in range(3))
    state = State.start(to_grid(x, RULE.ulp), RULE, is_reversible=True)
    largest = no_magnitudes(x)
    return {
        "copy": lambda: out.copy_(x),
        "advance": lambda: kernels.advance(state, y, largest, RULE, 0),
        "retreat": lambda: kernels.retreat(state, RULE),
        "undo": lambda: kernels.undo(state, y, RULE, 0),
    }


def measure(size: int, device: torch.device, seconds: float = 1) -> list[Row]:
    """The rows of one size, each timed for so many ``seconds``."""
    calls = make_calls(size, device)
    speeds = {(name, "fused"): _speed(size, name, call, seconds) for name, call in calls.items()}
    with patch.object(fused, "are_for", return_value=False):
        for name in ("advance", "retreat", "undo"):
            speeds[name, "pieces"] = _speed(size, name, calls[name], seconds)
    return [
        {
            "elements": str(size),
            "operation": name,
            "way": "PyTorch" if name == "copy" else way,
            "GB/s": f"{speed:.2f}",
            "of a copy": f"{speed / speeds['copy', 'fused']:.2f}",
        }
        for (name, way), speed in speeds.items()
    ]


def _speed(size: int, name: str, call: Callable[[], object], seconds: float) -> float:
    """In GB/s; the timer waits for a GPU."""
    # To import it asks CUDA whether a GPU is there, after which no fork could use one (gpu.py).
    from torch.utils.benchmark import Timer

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return MOVED[name] * size / timer.blocked_autorange(min_run_time=seconds).median / 1e9


def main(out: Out = None) -> None:
    """Time the steps."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for size in SIZES:
        Console(stderr=True).print(f"{size} elements")
        log.merge(measure(size, device), KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)

"""What other tools say that a training step needs, next to the measured peak.

All of it: weights, gradients, the state of SGD with momentum, the batch and what the step
allocates, as PyTorch's CPU allocator counts it. accelerate (the arithmetic of `accelerate
estimate-memory`) knows neither images nor activations and assumes Adam; torchinfo counts the output
of every layer twice; torch's MemTracker follows a step on fake tensors, as momconv does, but knows
nothing of what a kernel takes for itself. Seconds are those that a tool took.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import typer
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD

from benchmarks.cases import Case
from benchmarks.isolation import attempt
from benchmarks.methods import make_network
from benchmarks.tables import Log, Out, Row, show
from momconv import convert, peak_memory
from momconv.planner.fakes import Imitator
from momconv.planner.measurement import measure_step

MIB = 2**20
CPU = torch.device("cpu")
TITLE = "estimates"
KEY = ("network", "images", "tool")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is trained: a network as it is, or converted."""

    case: Case
    is_converted: bool = False

    @property
    def name(self) -> str:
        """Such as "converted resnet50"."""
        return f"{'converted ' * self.is_converted}{self.case.network}"

    def make(self) -> nn.Module:
        """The network in training mode."""
        model = make_network(self.case.network).train()
        return convert(model).train() if self.is_converted else model


SUBJECTS = [
    Subject(Case("resnet50", 128, 8)),
    Subject(Case("vit_b_16", 224, 2)),
    Subject(Case("resnet152", 96, 8), is_converted=True),
]


def measure(model: nn.Module, case: Case) -> int:
    """The bytes of a step that is run, and of what is there before it."""
    peak = peak_memory(model, case.batch, case.resolution)
    step = measure_step(model, case.batch, case.resolution, precision="fp32", device=CPU)
    return peak.static + peak.batch + step


def ask_momconv(model: nn.Module, case: Case) -> int:
    """``momconv.peak_memory``."""
    return peak_memory(model, case.batch, case.resolution).total


def ask_accelerate(model: nn.Module, _case: Case) -> int:
    """The "Training using Adam" of ``accelerate estimate-memory``."""
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    size, _ = calculate_maximum_sizes(model)
    return int(estimate_training_usage(size, "float32")["step"])


def ask_torchinfo(model: nn.Module, case: Case) -> int:
    """The "Estimated Total Size" of ``torchinfo.summary``."""
    from torchinfo import summary

    size = (case.batch, 3, case.resolution, case.resolution)
    found = summary(model, size, device=CPU, mode="train", verbose=0)
    return int(found.total_input + found.total_output_bytes + found.total_param_bytes)


def ask_tracker(model: nn.Module, case: Case) -> int:
    """The peak of ``torch.distributed._tools.mem_tracker.MemTracker`` over two steps."""
    from torch.distributed._tools.mem_tracker import MemTracker

    imitator = Imitator(lambda *_: None)
    fake = imitator.copy(model, CPU)
    with imitator.mode:
        optimizer = SGD(fake.parameters(), lr=0.1, momentum=0.9)
        images = torch.empty(case.batch, 3, case.resolution, case.resolution)
        labels = torch.empty(case.batch, dtype=torch.long)
        tracker = MemTracker()
        tracker.track_external(fake, optimizer, images, labels)
        with tracker:
            for _ in range(2):
                F.cross_entropy(fake(images), labels).backward()
                optimizer.step()
                tracker.reset_mod_stats()
    return int(tracker.get_tracker_snapshot("peak")[CPU]["Total"])


TOOLS: dict[str, Callable[[nn.Module, Case], int]] = {
    "measured": measure,
    "momconv": ask_momconv,
    "accelerate": ask_accelerate,
    "torchinfo": ask_torchinfo,
    "MemTracker": ask_tracker,
}


def ask(subject: Subject, tool: str) -> tuple[int, float]:
    """Bytes, and the seconds that it took to find them out."""
    model = subject.make()
    began = time.perf_counter()
    return TOOLS[tool](model, subject.case), time.perf_counter() - began


def compare(subject: Subject) -> Iterator[Row]:
    """A row of the table for each tool."""
    case = subject.case
    measured: int | None = None
    for tool in TOOLS:
        said = attempt(ask, subject, tool)
        row = {
            "network": subject.name,
            "images": f"{case.batch} × {case.resolution}²",
            "tool": tool,
        }
        if isinstance(said, str):
            yield row | {"MiB": said, "% of measured": "–", "seconds": "–"}
            continue
        size, seconds = said
        measured = measured or size
        percent = f"{100 * size / measured:.1f}"
        yield row | {
            "MiB": f"{size / MIB:.1f}",
            "% of measured": percent,
            "seconds": f"{seconds:.1f}",
        }


def main(out: Out = None) -> None:
    """Ask every tool about every network."""
    log = Log.of(TITLE, CPU, out)
    for subject in SUBJECTS:
        for row in compare(subject):
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)

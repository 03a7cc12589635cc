"""The share of a step that summing gradients takes, of processes that talk over gloo.

Each takes steps of its own images, of a network with random weights under strategy "store", in
three ways, in turns: without sums; with one all-reduce of each gradient once backward is over; and
as momconv does, in a few pieces while backward goes on. A step is timed from its beginning until
all processes have it. The table has medians over the turns, and the share 1 − (time without
sums) / time. Processes have one thread each. Where they share a processor core, as on a machine
with fewer cores than processes, computation and sums take each other's time, and there is little
to gain: where each has cores, and a network card, of its own, sums cost less.
"""

import os
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context
from typing import Annotated

import torch
import typer
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from benchmarks.tables import Log, Out, Row, show
from momconv.training.gradients import Buckets
from momconv.training.processes import Processes, joined
from momconv.zoo.networks import build

TITLE = "processes"
KEY = ("network", "images", "processes")
COUNTS = (2, 4)
Step = Callable[[], None]


def run_step(model: nn.Module, images: Tensor) -> None:
    """Both passes."""
    F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long)).backward()


def make_ways(model: nn.Module, images: Tensor, processes: Processes) -> dict[str, Step]:
    """A step in each of the three ways."""
    buckets = Buckets(processes)

    def alone() -> None:
        model.zero_grad()
        run_step(model, images)

    def afterwards() -> None:
        alone()
        processes.add(p.grad for p in model.parameters() if p.grad is not None)

    def during() -> None:
        buckets.begin(model, passes=1)
        run_step(model, images)
        buckets.end_pass()
        buckets.finish()

    return {"without": alone, "after": afterwards, "during": during}


def time_ways(network: str, images: int, side: int, turns: int) -> dict[str, float]:
    """Seconds of a step in each way."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with joined() as processes:
        model = build(network).train()
        ways = make_ways(model, torch.randn(images, 3, side, side), processes)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(turns + 1):
            for name, step in ways.items():
                distributed.barrier()
                began = time.perf_counter()
                step()
                distributed.barrier()
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _take_part(rank: int, count: int, port: int, case: tuple[str, int, int, int]) -> Row:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID=TITLE,
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
    )
    seconds = time_ways(*case)
    shares = {name: 1 - seconds["without"] / seconds[name] for name in ("after", "during")}
    return {
        "network": case[0],
        "images": f"{case[1]} of {case[2]} pixels",
        "processes": str(count),
        "cores": str(len(os.sched_getaffinity(0))),
        **{f"s, {name}": f"{value:.3f}" for name, value in seconds.items()},
        **{f"share of sums, {name}": f"{share:.1%}" for name, share in shares.items()},
    }


def main(  # noqa: PLR0913 (one for each choice)
    network: Annotated[str, typer.Option(help="By its name.")] = "resnet18",
    images: Annotated[int, typer.Option(help="Of each process.")] = 4,
    side: Annotated[int, typer.Option(help="Of an image, in pixels.")] = 112,
    processes: Annotated[list[int] | None, typer.Option(help="How many.")] = None,
    turns: Annotated[int, typer.Option(help="That count.")] = 7,
    port: Annotated[int, typer.Option(help="On which they meet.")] = 29600,
    out: Out = None,
) -> None:
    """Measure what sums of gradients cost."""
    log = Log.of(TITLE, torch.device("cpu"), out)
    for count in processes or COUNTS:
        case = (network, images, side, turns)
        with get_context("spawn").Pool(count) as pool:
            args = [(rank, count, port, case) for rank in range(count)]
            first, *_ = pool.starmap(_take_part, args, chunksize=1)
        log.merge([first], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)

"""How well the cost model of the planner foretells which strategy is faster, and by how much.

Seconds of a training step under each strategy, and what momconv.planner.cost predicts: with a
speed that is fitted to two small steps, as in a fine-tuning run, and with the one that is assumed
for any CPU. Ratios are to storing all. The strategies take turns, and the fastest of five steps
counts, each after one to warm up.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.cases import Case, Networks, choose
from benchmarks.methods import make_network
from benchmarks.tables import Log, Out, Row, choose_device, show
from momconv import convert, set_strategy
from momconv.planner.cost import estimate_speed
from momconv.planner.measurement import available_bytes, time_step
from momconv.planner.prediction import Predictor, Training
from momconv.planner.speed import measure_speed
from momconv.vocabulary import STRATEGIES, StrategyChoice

TITLE = "cost"
KEY = ("network", "images", "strategy")
TURNS = 5

CASES = [
    Case("cifar_resnet110", 32, 4),
    Case("cifar_resnet110", 32, 32),
    Case("resnet50", 96, 4),
    Case("resnet50", 96, 16),
    Case("resnet50", 224, 8),
    Case("resnet152", 96, 8),
    Case("vit_b_16", 224, 2),
]


def measure(case: Case, device: torch.device) -> Iterator[Row]:
    """A row of the table for each strategy."""
    model = convert(make_network(case.network), stages="all").to(device)
    training = Training(case.resolution, case.precision, device=device.type)
    speeds = {
        "calibrated": measure_speed(model, training, available_bytes(device)),
        "assumed": estimate_speed(device.type, case.precision),
    }
    predictor, strategies = Predictor(model, training), tuple(STRATEGIES)
    measured = time_all(model, case, strategies, device)
    first: dict[str, float] = {}
    for strategy in strategies:
        work = predictor.predict(case.batch, strategy).work
        seconds = {"measured": measured[strategy]}
        seconds |= {name: speed.seconds(work) for name, speed in speeds.items()}
        first = first or seconds
        yield {
            "network": case.network,
            "images": f"{case.batch} × {case.resolution}²",
            "strategy": strategy,
            **{f"{name} s": f"{value:.3f}" for name, value in seconds.items()},
            **{f"{name} ratio": f"{value / first[name]:.2f}" for name, value in seconds.items()},
        }


def time_all(
    model: nn.Module, case: Case, strategies: Sequence[StrategyChoice], device: torch.device
) -> dict[StrategyChoice, float]:
    """The fastest step under each strategy."""
    fastest = dict.fromkeys(strategies, math.inf)
    for strategy in (*strategies,) * TURNS:
        set_strategy(model, strategy)
        seconds = time_step(model, case.batch, case.resolution, case.precision, device)
        fastest[strategy] = min(fastest[strategy], seconds)
    return fastest


def main(networks: Networks, out: Out = None) -> None:
    """Time each strategy and predict its time."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for case in choose(CASES, networks):
        for row in measure(case, device):
            Console(stderr=True).print(*row.values())
            log.merge([row], KEY)
    show(TITLE, log.read())


if __name__ == "__main__":
    typer.run(main)

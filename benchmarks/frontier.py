"""Time of a training step over its memory, at ten budgets from the least memory to all.

At each budget momconv plans a way for each stage: of the converted network ("momconv"), and of the
plain one ("momconv, plain"), which has the same ways but for inversion. Where the second is as fast
in as little memory, inversion buys nothing. torch's checkpointing is there around each block and
around √L blocks, and momentumnet.

Memory is what the allocator hands out, without weights, gradients, optimiser state and images. The
methods have a process each. All points take turns, and each step is compared with the storing
step of the plain network of the same turn; the table has medians. A first turn is not counted, nor
is the first of the two steps that a point takes in each turn.
"""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
import typer
from rich.console import Console
from torch import nn

from benchmarks.cases import Case, Networks, choose, prepare
from benchmarks.isolation import outcome, start_process
from benchmarks.memory import MIB, VALUE
from benchmarks.methods import METHODS, make_network, select
from benchmarks.speed import time_model
from benchmarks.tables import MISSING, Log, Out, Row, choose_device, number, show
from momconv import convert, set_strategy
from momconv.planner.combination import Combinations
from momconv.planner.cost import estimate_speed
from momconv.planner.measurement import measure_step
from momconv.planner.prediction import Predictor, Training

TITLE = "frontier"
KEY = ("network", "method", "budget")
RATIO = "of store all"
BUDGETS, TURNS = 10, 3
FINENESS = 0.97  # of the search for the least budget
OURS = {"momconv": 0.9, "momconv, plain": 0.0}  # with their γ
THEIRS = ["store", "checkpoint", "checkpoint-sqrt", "momentumnet"]
CASES = [
    Case("resnet152", 224, 8),
    Case("cifar_resnet1202", 32, 8),
    Case("vit_l_16", 224, 4),
    Case("convnext_large", 224, 4),
]


class Point(NamedTuple):
    """A method and, for momconv, the ways of the stages within a budget."""

    method: str
    budget: str = MISSING  # MiB per image
    ways: tuple[tuple[str, str], ...] = ()


class Taken(NamedTuple):
    """What a step took."""

    seconds: float
    mib: float  # per image; 0 where it is not measured


def plan_points(case: Case, method: str) -> list[Point]:
    """The fastest combinations of ways within the budgets, each once."""
    with torch.device("meta"):
        model = convert(make_network(case.network), OURS[method])
    predictor = Predictor(model, Training(case.resolution, case.precision))
    stored = predictor.predict(case.batch, "store")
    combinations = Combinations(predictor, case.batch, stored)
    speed = estimate_speed("cpu", case.precision)
    least = float(stored.peak.step)
    while combinations.find(least * FINENESS, speed):
        least *= FINENESS
    found: dict[tuple[tuple[str, str], ...], Point] = {}
    for n in range(BUDGETS):
        budget = least * (stored.peak.step / least) ** (n / (BUDGETS - 1))
        if best := combinations.find(budget, speed):
            ways = tuple((name, str(way)) for name, way in best.ways.items())
            found.setdefault(ways, Point(method, f"{budget / case.batch / MIB:.2f}", ways))
    return [*found.values()]


@cache
def prepare_once(case: Case, method: str, device: torch.device) -> nn.Module:
    """The network of a method, in the method's own process."""
    if method in OURS:
        return convert(make_network(case.network), OURS[method]).to(device)
    return prepare(case, method, device)


def take(case: Case, point: Point, device: torch.device, is_measured: bool) -> Taken:  # noqa: FBT001
    """Time a step at ``point`` and, if that is wanted, measure its memory."""
    model, peak = prepare_once(case, point.method, device), 0
    if point.ways:
        set_strategy(model, dict(point.ways))
    if is_measured:
        peak = measure_step(
            model, case.batch, case.resolution, precision=case.precision, device=device
        )
    taken = Taken(time_model(model, case, device).seconds, peak / case.batch / MIB)
    model.zero_grad()  # while other methods have their turn
    return taken


def compare(case: Case, device: torch.device) -> list[Row]:
    """A row for each point."""
    methods = [*select(case.network, THEIRS), *OURS]
    with ExitStack() as stack:
        processes = {key: stack.enter_context(start_process()) for key in methods}
        points = [Point(key) for key in methods if key not in OURS]
        for key in OURS:
            planned = outcome(processes[key], plan_points, case, key)
            points += [Point(key, planned)] if isinstance(planned, str) else planned
        turns = [
            [outcome(processes[p.method], take, case, p, device, not turn) for p in points]
            for turn in range(1 + TURNS)
        ]
    first, *others = turns
    rows = []
    for n, (point, taken) in enumerate(zip(points, first, strict=True)):
        steps = [turn[n] for turn in others]
        failed = next((step for step in [taken, *steps] if isinstance(step, str)), None)
        ratios = [_seconds(turn[n]) / _seconds(turn[0]) for turn in others]
        rows.append(
            {
                "network": case.label,
                "method": point.method if point.method in OURS else METHODS[point.method].label,
                "budget": point.budget,
                "ways": ", ".join(f"{name} {way}" for name, way in point.ways) or MISSING,
                VALUE: failed or f"{taken.mib:.1f}",  # type: ignore[union-attr]
                "seconds": failed or f"{statistics.median(map(_seconds, steps)):.3g}",
                RATIO: failed or f"{statistics.median(ratios):.3f}",
            }
        )
    return rows


def _seconds(step: Taken | str) -> float:
    return float("nan") if isinstance(step, str) else step.seconds


def present(rows: Sequence[Row]) -> list[Row]:
    """The fastest step of each method within the memory of each point of momconv."""
    return [
        {
            "network": row["network"],
            VALUE: row[VALUE],
            "momconv": row[RATIO],
            "momconv, plain": _find_fastest(row, rows, ("momconv, plain",)),
            "torch": _find_fastest(row, rows, ("store", "checkpoint")),
            "momentumnet": _find_fastest(row, rows, ("momentumnet",)),
        }
        for row in rows
        if row["method"] == "momconv"
    ]


def _find_fastest(row: Row, rows: Sequence[Row], methods: tuple[str, ...]) -> str:
    limit = number(row, VALUE) or 0.0
    ratios = [
        ratio
        for other in rows
        if other["network"] == row["network"] and other["method"].startswith(methods)
        if (mib := number(other, VALUE)) is not None and mib <= limit
        if (ratio := number(other, RATIO)) is not None
    ]
    return f"{min(ratios):.3f}" if ratios else MISSING


def main(networks: Networks, out: Out = None, images: int | None = None) -> None:
    """Measure time and memory of a training step, of so many images, at each budget."""
    device = choose_device()
    log = Log.of(TITLE, device, out)
    for case in choose(CASES, networks):
        case = replace(case, batch=images or case.batch)
        Console(stderr=True).print(case.label)
        log.merge(compare(case, device), KEY)
    show(TITLE, log.read())
    show("fastest within the memory of momconv's points", present(log.read()))


if __name__ == "__main__":
    typer.run(main)

"""Figure 7, memory over the batch, and over γ: ``python -m recipes.paper.fig7``.

ResNet-152 on images of 224² and the CIFAR ResNet-110 (with ``--full`` 1202) on 32²: the peak of a
training step, predicted by ``momconv.peak_memory`` with weights, gradients, SGD's state and images
included, for the ResNet and for the Momentum ResNet (γ = 0.9, all runs of blocks) whose blocks are
checkpointed, or reconstructed ("auto"). Then what smaller γ costs in the CIFAR network, whose
stages have 18 and 17 blocks (1202: 200 and 199). The predictions are exact to a thousandth on a
CPU (benchmarks/RESULTS.md, prediction). ``python -m benchmarks.batches`` measures, momentumnet
included. Last, accuracy against memory as γ varies: the published ResNet-20 (``--weights``),
calibrated on 500 training images of CIFAR-10 (``--data``) without their labels, on 1,000 others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from matplotlib.figure import Figure
from torch import nn

from benchmarks.tables import Row
from momconv import calibrate, convert, load_network, peak_memory
from momconv.momentum.autograd import Strategy
from momconv.planner.prediction import PeakMemory
from recipes.paper import cifar
from recipes.paper.report import MOMENTUM, RESNET, REVNET, Claim, panels, report

GAMMAS = (0.1, 0.3, 0.5, 0.9, 0.99)
GIB, MIB = 2**30, 2**20
COLOURS = {
    "ResNet": RESNET,
    "momentum, checkpointed": REVNET,
    "momentum, reconstructed": MOMENTUM,
}
Curves = dict[str, dict[int, PeakMemory]]  # by method and batch


@dataclass(frozen=True, slots=True)
class Case:
    """A network and the batches to predict for."""

    network: str
    resolution: int
    batches: tuple[int, ...]


IMAGENET = Case("resnet152", 224, (8, 32))
CIFAR = Case("cifar_resnet110", 32, (32, 128))
CIFAR_FULL = Case("cifar_resnet1202", 32, (32, 128))
SMALL = Case("cifar_resnet20", 32, (8,))


def make(name: str, gamma: float = 0.9) -> nn.Module:
    """The network with random weights; γ = 0 is the plain one."""
    plain = load_network(name, weights="none").train()
    return convert(plain, gamma, stages="all") if gamma else plain


def predict(case: Case) -> Curves:
    """The peaks of every method."""
    plain, momentum = make(case.network, 0), make(case.network)
    ways: list[tuple[nn.Module, Strategy | Literal["auto"] | None]] = [
        (plain, None),
        (momentum, "checkpoint"),
        (momentum, "auto"),
    ]
    return {
        method: {
            batch: peak_memory(model, batch, case.resolution, strategy=strategy)
            for batch in case.batches
        }
        for method, (model, strategy) in zip(COLOURS, ways, strict=True)
    }


def predict_gammas(case: Case, gammas: tuple[float, ...] = GAMMAS) -> dict[float, PeakMemory]:
    """The peak for eight images, by γ."""
    return {gamma: peak_memory(make(case.network, gamma), 8, case.resolution) for gamma in gammas}


def measure_accuracies(
    plain: nn.Module, archive: Path, gammas: tuple[float, ...] = (0.0, *GAMMAS)
) -> dict[float, float]:
    """Top-1 in percent of the calibrated network, by γ."""
    train, val = cifar.read(archive, "train", 50), cifar.read(archive, "val", 100)
    device = next(plain.parameters()).device
    images = [x for x, _ in train.batches(device, augment=False)]
    result = {}
    for gamma in gammas:
        model = convert(plain, gamma, "all") if gamma else plain
        if gamma:
            imitation = calibrate(model, images, plain).imitation
            if imitation and imitation.interrupted:  # it would be another network's accuracy
                raise KeyboardInterrupt
        result[gamma] = cifar.accuracy(model, val)
    return result


def judge(curves: list[Curves]) -> Claim:
    """At the largest batch, in every network."""
    parts = [[curve[max(curve)].total for curve in case.values()] for case in curves]
    holds = all(peaks[-1] == min(peaks) and peaks[-1] < peaks[0] / 2 for peaks in parts)
    return Claim("momentum trains the same batch in less than half of the ResNet's memory", holds)


def draw(
    cases: list[Case],
    curves: list[Curves],
    gammas: dict[float, PeakMemory],
    trade: dict[float, tuple[float, float]],
) -> Figure:
    """Memory over the batch for each network, and over γ for the last; accuracy over memory."""
    figure, (*grid, middle, last) = panels(len(cases) + 2)
    for axes, case, methods in zip(grid, cases, curves, strict=True):
        for method, points in methods.items():
            peaks = [peak.total / GIB for peak in points.values()]
            axes.plot(list(points), peaks, "o-", color=COLOURS[method], label=method)
        title = f"{case.network}, {case.resolution}²"
        axes.set(title=title, xlabel="batch", ylabel="peak (GiB)", ylim=(0, None))
    grid[0].legend(fontsize="small")
    for label, style, sizes in (
        ("a step", "o-", [peak.step for peak in gammas.values()]),
        ("remainders", "o:", [peak.side_information for peak in gammas.values()]),
    ):
        an_image = [size / 8 / MIB for size in sizes]
        middle.plot(list(gammas), an_image, style, color=MOMENTUM, label=label)
    middle.set(title=cases[-1].network, xlabel="γ", ylabel="MiB an image", ylim=(0, None))
    middle.legend(fontsize="small")
    for gamma, (size, accuracy) in trade.items():
        last.plot(size, accuracy, "o", color=MOMENTUM if gamma else RESNET)
        last.annotate(f"γ = {gamma:g}", (size, accuracy), fontsize="x-small")
    last.set(title="ResNet-20", xlabel="MiB an image", ylabel="accuracy (%)")
    return figure


def tabulate(case: Case, method: str, batch: int, peak: PeakMemory) -> Row:
    """A row of the table."""
    return {
        "network": case.network,
        "method": method,
        "batch": str(batch),
        "peak in GiB": f"{peak.total / GIB:.2f}",
        "a step, MiB an image": f"{peak.step / batch / MIB:.2f}",
        "of these remainders": f"{peak.side_information / batch / MIB:.3f}",
        "accuracy in %": "",
    }


def main(
    full: Annotated[bool, typer.Option("--full", help="The CIFAR ResNet-1202.")] = False,
    data: Annotated[Path, typer.Option(help="CIFAR-10 as images in a ZIP file.")] = cifar.ARCHIVE,
    weights: Annotated[Path, typer.Option(help="Folder of the published ones.")] = cifar.WEIGHTS,
) -> None:
    """Predict, without running a step, and calibrate for the accuracies."""
    cases = [IMAGENET, CIFAR_FULL if full else CIFAR]
    curves = [predict(case) for case in cases]
    gammas = predict_gammas(cases[-1])
    rows = [
        tabulate(case, method, batch, peak)
        for case, methods in zip(cases, curves, strict=True)
        for method, points in methods.items()
        for batch, peak in points.items()
    ]
    rows += [tabulate(cases[-1], f"γ = {gamma:g}", 8, peak) for gamma, peak in gammas.items()]
    trade = {}
    if file := cifar.find_published(weights).get(SMALL.network):
        accuracies = measure_accuracies(load_network(SMALL.network, file), data)
        for gamma, peak in predict_gammas(SMALL, tuple(accuracies)).items():
            trade[gamma] = (peak.step / 8 / MIB, accuracies[gamma])
            row = tabulate(SMALL, f"γ = {gamma:g}", 8, peak)
            rows.append(row | {"accuracy in %": f"{accuracies[gamma]:.1f}"})
    report("fig7", rows, draw(cases, curves, gammas, trade), judge(curves))


if __name__ == "__main__":
    typer.run(main)

"""Figure 6, another γ at test time than at training time: ``python -m recipes.paper.fig6``.

A network trained with γ_train runs with γ_test: the same weights (the state-dict keys are the
same) under another rule, as it is and after a refit, one more epoch at a tenth of the learning
rate on the training images. The default trains ResNet-20 as table2 does, on a part of CIFAR-10,
and takes over what table2 has trained; ``--full`` does so with ResNet-101 on all of CIFAR-10, on a
GPU. γ = 0 is the ResNet.
"""

import copy
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from torch import nn

from benchmarks.tables import Row
from momconv import convert
from recipes.paper import cifar
from recipes.paper.cifar import Schedule
from recipes.paper.report import Claim, panels, report
from recipes.paper.table2 import GAMMA, Task, large, make, small, train

GAMMAS = (0.0, 0.5, 0.9)
TESTED = (0.0, 0.3, 0.5, 0.7, 0.9)
REFIT = Schedule(1, rate=0.01)
MOMENTUM, RESNET = "Momentum ResNet, v₀ = 0", "ResNet"

Accuracies = dict[float, tuple[float, float]]  # by γ_test: as it is, and refitted, in percent


def with_gamma(network: nn.Module, gamma: float) -> nn.Module:
    """The weights of ``network`` under another γ, without gains, as in the paper."""
    return convert(network, gamma, "all", gain=False) if gamma else copy.deepcopy(network)


def trained(task: Task, gamma: float) -> nn.Module:
    """The plain network with the weights that training with γ gave."""
    network = train(task, MOMENTUM if gamma else RESNET, 0, gamma or GAMMA)
    plain = make(task, RESNET, 0)
    plain.load_state_dict(network.state_dict())
    return plain


def retest(task: Task, plain: nn.Module, gammas: tuple[float, ...] = TESTED) -> Accuracies:
    """The accuracies under every γ."""
    result = {}
    for gamma in gammas:
        network = with_gamma(plain, gamma)
        before = cifar.accuracy(network, task.val)
        cifar.train(network, task.train, REFIT)
        result[gamma] = (before, cifar.accuracy(network, task.val))
    return result


def judge(results: dict[float, Accuracies]) -> Claim:
    """Over all pairs, refitted networks miss less than half of what the others miss."""
    gaps, refitted = [], []
    for gamma, accuracies in results.items():
        own = max(accuracies[gamma])
        gaps += [own - before for before, _ in accuracies.values()]
        refitted += [own - after for _, after in accuracies.values()]
    text = "a refit makes up for most of what another γ at test time costs"
    return Claim(text, sum(refitted) < sum(gaps) / 2)


def draw(results: dict[float, Accuracies]) -> Figure:
    """Accuracy over γ_test, for each γ_train."""
    figure, grid = panels(len(results))
    for axes, (gamma, accuracies) in zip(grid, results.items(), strict=True):
        before, after = zip(*accuracies.values(), strict=True)
        axes.plot(list(accuracies), before, "o-", color="#000000", label="as it is")
        axes.plot(list(accuracies), after, "o--", color="#D55E00", label="refitted")
        axes.axvline(gamma, color="#999999", lw=0.8)
        axes.set(title=f"γ_train = {gamma:g}", xlabel="γ_test", ylabel="accuracy (%)")
    grid[0].legend(fontsize="small")
    return figure


def main(
    full: Annotated[bool, typer.Option("--full", help="The paper's network and data.")] = False,
    data: Annotated[Path, typer.Option(help="CIFAR-10 as images in a ZIP file.")] = cifar.ARCHIVE,
) -> None:
    """Train with each γ, and test with each."""
    task = large(10) if full else small(data)
    results = {gamma: retest(task, trained(task, gamma)) for gamma in GAMMAS}
    rows: list[Row] = [
        {"γ_train": f"{gamma:g}", "network": name}
        | {f"γ_test = {tested:g}": f"{pair[n]:.1f}" for tested, pair in accuracies.items()}
        for gamma, accuracies in results.items()
        for n, name in enumerate(("as it is", "refitted"))
    ]
    report("fig6", rows, draw(results), judge(results))


if __name__ == "__main__":
    typer.run(main)

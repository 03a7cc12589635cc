"""Figure 6, another γ at test time than at training time: ``python -m recipes.paper.fig6``.

A network trained with γ_train runs with γ_test: the same weights (the state-dict keys are the same)
under another rule, as it is and after a refit, one more epoch on the training images, whose
learning rate goes from 0.01 to 0. The default trains ResNet-20 as table2 does, on a part of
CIFAR-10, and takes over what table2 has trained, and tests the published ResNet-20 as well;
``--full`` trains ResNet-101 on all of CIFAR-10, on a GPU. γ = 0 is the ResNet.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.figure import Figure
from torch import nn

from benchmarks.tables import Row
from recipes.paper import cifar
from recipes.paper.cifar import Schedule
from recipes.paper.report import Claim, panels, report
from recipes.paper.table2 import GAMMA, Task, large, make, published, small, train, with_momentum

GAMMAS = (0.0, 0.5, 0.9)
TESTED = (0.0, 0.3, 0.5, 0.7, 0.9)
REFIT = Schedule(1, rate=0.01)
MOMENTUM, RESNET = "Momentum ResNet, v₀ = 0", "ResNet"

Accuracies = dict[float, tuple[float, float]]  # by γ_test: as it is, and refitted, in percent


def with_gamma(task: Task, network: nn.Module, gamma: float) -> nn.Module:
    """The weights of ``network`` under another γ, without gains, as in the paper."""
    return with_momentum(task, network, gamma) if gamma else copy.deepcopy(network)


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
        network = with_gamma(task, plain, gamma)
        before = cifar.accuracy(network, task.val)
        tell = cifar.teller(f"{task.name}, refit with γ = {gamma:g}")
        cifar.train(network, task.train, REFIT, tell=tell)
        result[gamma] = (before, cifar.accuracy(network, task.val))
    return result


@dataclass(frozen=True, slots=True)
class Retest:
    """A trained network under other rules.

    Attributes:
        title: The network.
        gamma: γ_train.
        accuracies: Under every γ_test.
    """

    title: str
    gamma: float
    accuracies: Accuracies


def judge(tests: Sequence[Retest]) -> Claim:
    """Over all pairs, refitted networks miss less than half of what the others miss."""
    gaps, refitted = [], []
    for test in tests:
        own = max(test.accuracies[test.gamma])
        gaps += [own - before for before, _ in test.accuracies.values()]
        refitted += [own - after for _, after in test.accuracies.values()]
    text = "a refit makes up for most of what another γ at test time costs"
    return Claim(text, sum(refitted) < sum(gaps) / 2)


def draw(tests: Sequence[Retest]) -> Figure:
    """Accuracy over γ_test, for each network."""
    figure, grid = panels(len(tests))
    for axes, test in zip(grid, tests, strict=True):
        before, after = zip(*test.accuracies.values(), strict=True)
        axes.plot(list(test.accuracies), before, "o-", color="#000000", label="as it is")
        axes.plot(list(test.accuracies), after, "o--", color="#D55E00", label="refitted")
        axes.axvline(test.gamma, color="#999999", lw=0.8)
        title = f"{test.title}, γ_train = {test.gamma:g}"
        axes.set(title=title, xlabel="γ_test", ylabel="accuracy (%)")
    grid[0].legend(fontsize="small")
    return figure


def main(
    full: Annotated[bool, typer.Option("--full", help="The paper's network and data.")] = False,
    data: Annotated[Path, typer.Option(help="CIFAR-10 as images in a ZIP file.")] = cifar.ARCHIVE,
    weights: Annotated[Path, typer.Option(help="Folder of the published ones.")] = cifar.WEIGHTS,
) -> None:
    """Train with each γ, and test with each."""
    task = large(10) if full else small(data)
    tests = [Retest(task.name, gamma, retest(task, trained(task, gamma))) for gamma in GAMMAS]
    file = cifar.find_published(weights).get("cifar_resnet20")
    if file and not full:
        other = published(data, "cifar_resnet20", file)
        tests.append(Retest("published ResNet-20", 0.0, retest(other, other.make(10))))
    rows: list[Row] = [
        {"trained on": test.title, "γ_train": f"{test.gamma:g}", "network": name}
        | {f"γ_test = {tested:g}": f"{pair[n]:.1f}" for tested, pair in test.accuracies.items()}
        for test in tests
        for n, name in enumerate(("as it is", "refitted"))
    ]
    report("fig6", rows, draw(tests), judge(tests))


if __name__ == "__main__":
    typer.run(main)

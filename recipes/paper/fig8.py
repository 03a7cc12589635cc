"""Figure 8, fine-tuning in 3 GiB: ``python -m recipes.paper.fig8``.

ResNet-152 learns to tell ants from bees, at 500² pixels, within 3 GiB for weights, gradients, the
optimiser's state, images and activations: the plain network with everything stored and the
Momentum ResNet, each with the largest batch that fits. ``--full`` fine-tunes both with
recipes/hymenoptera.yaml and draws accuracy over time; ``--weights`` is a file, or "none" where
torchvision's cannot be downloaded. The default plans the batches and times a step of each network
on two images of half the size.
"""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from matplotlib.figure import Figure
from torch import nn

from benchmarks.tables import Row, choose_device
from momconv import convert, finetune, load_network, peak_memory
from momconv.cli._display import Display
from momconv.planner.micro_batch import Line
from momconv.recipe import load_recipe
from momconv.training.run_folder import RunFolder
from recipes.paper import cifar
from recipes.paper.report import MOMENTUM, RESNET, Claim, panels, report

NETWORK = "resnet152"
BUDGET = 3 * 2**30
RESOLUTION = 500
COLOURS = {"ResNet": RESNET, "Momentum ResNet": MOMENTUM}
GAMMAS = {"ResNet": 0.0, "Momentum ResNet": 0.9}


@dataclass(frozen=True, slots=True)
class Result:
    """The largest batch, the seconds of each epoch (or step), and the accuracies if it trained."""

    batch: int
    images_per_second: float
    curve: tuple[tuple[float, float], ...] = ()  # (seconds, accuracy in %)


def make(kind: str) -> nn.Module:
    """The network with random weights: what it computes does not matter here."""
    plain = load_network(NETWORK, weights="none").train()
    return convert(plain, GAMMAS[kind]) if GAMMAS[kind] else plain


def largest_batch(model: nn.Module, resolution: int = RESOLUTION, budget: int = BUDGET) -> int:
    """The most images that go through at once, from two predictions: memory is linear in them."""
    points = [(n, peak_memory(model, n, resolution).total) for n in (2, 4)]
    return Line.through(*points).largest_batch(budget)


def time_step(model: nn.Module, batch: int, resolution: int) -> float:
    """Images a second of one forward and backward pass, after another."""
    device = choose_device()
    model.to(device)
    for _ in range(2):
        begin = perf_counter()
        model(torch.randn(batch, 3, resolution, resolution, device=device)).mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return batch / (perf_counter() - begin)


def plan_and_time(kind: str) -> Result:
    """What can be shown without a GPU and without weights."""
    model = make(kind)
    return Result(largest_batch(model), time_step(model, 2, RESOLUTION // 2))


def fine_tune(kind: str, data: Path, weights: str) -> Result:
    """The recipe with the largest batch, run or resumed in runs/paper/."""
    batch = largest_batch(make(kind))
    plain = [] if GAMMAS[kind] else ["momentum.calibrate=false", "momentum.strategy=store"]
    changes = [f"momentum.gamma={GAMMAS[kind]}", f"train.batch_size={batch}", *plain]
    recipe = load_recipe(
        cifar.ROOT / "recipes" / "hymenoptera.yaml",
        [*changes, f"data.path={data}", f"model.weights={weights}"],
    )
    run = RunFolder(cifar.RUNS / f"hymenoptera, {kind}")
    with ExitStack() as bars:
        finetune(recipe, run.path, resume=not run.is_unused, listener=Display(bars))
    return Result(batch, *read_metrics(run.metrics))


def read_metrics(path: Path) -> tuple[float, tuple[tuple[float, float], ...]]:
    """Images a second in the last epoch, and the accuracy over the seconds of training."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    seconds, curve = 0.0, []
    for row in rows:
        seconds += float(row["seconds"])
        curve.append((seconds, 100 * float(row["val_top1"])))
    return float(rows[-1]["images_per_second"]), tuple(curve)


def judge(results: dict[str, Result]) -> Claim:
    """At least twice the batch."""
    plain, momentum = results.values()
    return Claim(
        "momentum trains with at least twice the ResNet's batch in the same memory",
        momentum.batch >= 2 * plain.batch,
    )


def draw(results: dict[str, Result]) -> Figure:
    """Batches, and accuracy over time or, without training, images a second."""
    figure, (batches, right) = panels(2)
    names, colours = list(results), list(COLOURS.values())
    batches.bar(names, [result.batch for result in results.values()], color=colours)
    batches.set(title="largest batch in 3 GiB", ylabel="images of 500²")
    if all(result.curve for result in results.values()):
        for name, result in results.items():
            right.plot(*zip(*result.curve, strict=True), "o-", color=COLOURS[name], label=name)
        right.set(title="fine-tuning", xlabel="seconds", ylabel="accuracy (%)")
        right.legend()
    else:
        right.bar(names, [result.images_per_second for result in results.values()], color=colours)
        right.set(title="speed, 2 images of 250²", ylabel="images a second")
    return figure


def main(
    full: Annotated[bool, typer.Option("--full", help="Fine-tune both networks.")] = False,
    data: Annotated[Path, typer.Option()] = cifar.ROOT.parent / "shared/data/hymenoptera",
    weights: Annotated[str, typer.Option(help="DEFAULT, none, or a file.")] = "DEFAULT",
) -> None:
    """Compare the plain network with the momentum network."""
    results = {
        kind: fine_tune(kind, data, weights) if full else plan_and_time(kind) for kind in GAMMAS
    }
    rows: list[Row] = [
        {
            "network": kind,
            "largest batch": str(result.batch),
            "images/s": f"{result.images_per_second:.2f}",
            "accuracy in %": f"{result.curve[-1][1]:.1f}" if result.curve else "–",
        }
        for kind, result in results.items()
    ]
    report("fig8", rows, draw(results), judge(results))


if __name__ == "__main__":
    typer.run(main)

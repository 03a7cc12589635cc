"""Pictures of the results: memory over depth and batch, time over depth, top-1 over epochs.

``python -m benchmarks.pictures`` draws them from the files in results/, for every machine.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import transfer, whole
from benchmarks.tables import Row, find_logs, number

Series = dict[str, list[tuple[float, float]]]  # points (x, MiB) by method

# Colours of Okabe and Ito, which colour-blind readers tell apart, and a marker for the others.
STYLES = {
    "store all": ("#000000", "o"),
    "checkpoint √L blocks": ("#0072B2", "s"),
    "checkpoint each block": ("#009E73", "x"),
    "momentumnet, gradients apart": ("#56B4E9", "v"),
    "momentumnet": ("#E69F00", "^"),
    "momconv, plain": ("#CC79A7", "v"),
    "momconv": ("#D55E00", "D"),
}

WHOLE_COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00")

TRANSFER_STYLES = {
    "plain": ("#000000", "o"),
    "swapped rule": ("#E69F00", "^"),
    "gains": ("#56B4E9", "v"),
    "calibrated": ("#D55E00", "D"),
    "annealed": ("#0072B2", "s"),
    "default stages, swapped rule": ("#CC79A7", "x"),
    "default stages, calibrated": ("#009E73", "v"),
    "calibrated, γ = 0.5": ("#D55E00", "o"),
    "plain, sgd-8bit": ("#000000", "x"),
    "plain, adamw": ("#F0E442", "o"),
    "plain, adamw-8bit": ("#F0E442", "x"),
}


def draw_depth(rows: Sequence[Row]) -> Figure:
    """Memory over depth, as in figure 2 of the paper."""
    series = collect(rows, "depth")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    plot(axes, series)
    axes.set(
        title=growth(series),
        xlabel="depth k (residual blocks)",
        ylabel="peak memory of a training step (MiB)",
        yscale="log",
    )
    add_legend(figure, axes)
    return figure


def draw_batches(rows: Sequence[Row]) -> Figure:
    """Memory over the batch, as in figure 7 of the paper, with a panel for each network."""
    networks = list(dict.fromkeys((row["network"], row["resolution"]) for row in rows))
    figure = Figure(figsize=(4.8 * len(networks), 4.4), layout="constrained")
    panels = figure.subplots(1, len(networks), squeeze=False)[0]
    for axes, (network, resolution) in zip(panels, networks, strict=True):
        own = [row for row in rows if (row["network"], row["resolution"]) == (network, resolution)]
        series = collect(own, "batch")
        plot(axes, series)
        axes.set(
            title=f"{network}, {resolution}²:\n{advantage(series)}",
            xlabel="batch (images)",
            ylabel="peak memory of a training step (MiB)",
            yscale="log",
        )
        add_legend(figure, axes)
    return figure


def draw_ladder(rows: Sequence[Row]) -> Figure:
    """Memory and time for an image over depth, with a column for each network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(4.8 * len(networks), 6.4), layout="constrained")
    panels = figure.subplots(2, len(networks), squeeze=False)
    for network, (memory, seconds) in zip(networks, panels.T, strict=True):
        own = [row for row in rows if row["network"] == network]
        plot(memory, collect(own, "depth"))
        plot(seconds, collect(own, "depth", "seconds"))
        memory.set(title=network, ylabel="MiB for an image", xscale="log", yscale="log")
        seconds.set(xlabel="depth", ylabel="seconds for an image", xscale="log", yscale="log")
        depths = sorted({int(row["depth"]) for row in own})
        for axes in (memory, seconds):
            axes.set_xticks(depths, map(str, depths))
            axes.set_xticks([], minor=True)
    add_legend(figure, panels[0, 0])
    return figure


def draw_transfer(rows: Sequence[Row]) -> Figure:
    """Top-1 over the epochs of fine-tuning, with the standard deviation over the seeds."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for method, epochs in transfer.summarise(rows).items():
        colour, marker = TRANSFER_STYLES[method]
        means, deviations = zip(*epochs.values(), strict=True)
        axes.errorbar(
            list(epochs),
            means,
            deviations,
            color=colour,
            marker=marker,
            capsize=3,
            label=method,
        )
    axes.set(
        xlabel="epochs of fine-tuning",
        ylabel="top-1 on held-out images (%)",
        xticks=range(1, transfer.EPOCHS + 1),
    )
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, axes)
    return figure


def draw_frontier(rows: Sequence[Row]) -> Figure:
    """Time over memory, with a panel for each network, two in a row."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    lines = math.ceil(len(networks) / 2)
    figure = Figure(figsize=(9.6, 0.6 + 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, 2, squeeze=False).flatten()
    for axes in panels[len(networks) :]:
        axes.remove()
    for axes, network in zip(panels, networks, strict=False):
        own = [row for row in rows if row["network"] == network]
        plot(axes, collect(own, "MiB per image", "of store all"))
        axes.set(
            title=network,
            xlabel="memory of a training step (MiB per image)",
            ylabel="time of a step, of storing all",
        )
    add_legend(figure, panels[0])
    return figure


def draw_whole(rows: Sequence[Row]) -> Figure:
    """What a step's memory consists of, as stacked bars, with a panel for each network."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    figure = Figure(figsize=(8, 1.9 * len(networks)), layout="constrained")
    panels = figure.subplots(len(networks), 1, squeeze=False)[:, 0]
    for axes, network in zip(panels, networks, strict=True):
        own = [row for row in rows if row["network"] == network][::-1]
        methods, ends = [row["method"] for row in own], [0.0] * len(own)
        for part, colour in zip(whole.PARTS, WHOLE_COLOURS, strict=True):
            sizes = [float(row[part]) / 1024 for row in own]
            axes.barh(methods, sizes, left=ends, color=colour, label=part)
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        axes.set(title=f"{network}, {own[-1]['optimizer']}", xlabel="GiB")
        axes.bar_label(axes.containers[-1], [f" {end:.1f}" for end in ends])
        axes.margins(x=0.08)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


PICTURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "depth": draw_depth,
    "batches": draw_batches,
    "ladder": draw_ladder,
    "transfer": draw_transfer,
    "frontier": draw_frontier,
    "whole": draw_whole,
}


def collect(rows: Sequence[Row], column: str, value_column: str = "MiB") -> Series:
    """The points of each method that did not fail, in the order of ``column``."""
    series: Series = {}
    for row in rows:
        if (value := number(row, value_column)) is not None:
            series.setdefault(row["method"], []).append((float(row[column]), value))
    return {method: sorted(points) for method, points in series.items()}


def plot(axes: Axes, series: Series) -> None:
    """A line for each method."""
    for method, points in series.items():
        colour, marker = next(style for name, style in STYLES.items() if method.startswith(name))
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, label=method)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, axes: Axes) -> None:
    """The methods of ``axes``, below all panels."""
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False
    )


def growth(series: Series) -> str:
    """How many times as much memory the largest depth takes as the smallest."""
    (few, _), (many, _) = series["momconv"][0], series["momconv"][-1]
    ours, theirs = (
        series[method][-1][1] / series[method][0][1] for method in ("momconv", "store all")
    )
    return (
        f"{many:.0f} blocks take {ours:.1f}× the memory of {few:.0f} with momconv,\n"
        f"{theirs:.0f}× with everything stored"
    )


def advantage(series: Series) -> str:
    """Which part of the next best method's memory momconv needs at the largest batch."""
    ours = series["momconv"][-1][1]
    best, name = min(
        (points[-1][1], method) for method, points in series.items() if method != "momconv"
    )
    return f"momconv needs {ours / best:.0%} of {name}"


def save_all() -> Iterator[Path]:
    """Draw a picture beside each log that has one."""
    for title, draw in PICTURES.items():
        for log in find_logs(title):
            draw(log.read()).savefig(log.picture, dpi=110)
            yield log.picture


if __name__ == "__main__":
    for path in save_all():
        Console(stderr=True).print(path)

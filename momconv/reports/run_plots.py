"""A run in pictures. Only this module and ``memory_plot`` draw."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from momconv.data.decoding import decode
from momconv.data.folder import printable
from momconv.evaluation import Mistake, Scores
from momconv.files.atomic import write_atomically
from momconv.training.planning import BatchPlan
from momconv.training.progress import EpochRow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CLASSES = 30  # above, only those that are confused most
_MOST_COUNTS = 12  # classes, up to which the counts are written in
_COLUMNS = 5  # of images
_SIDE = 240  # pixels of an image
_LENGTH = 24  # characters of a class


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curves(history: Sequence[EpochRow], path: Path) -> None:
    """Loss, top-1, learning rate and γ over the epochs."""
    epochs = [row.epoch for row in history]
    validated = [row for row in history if row.val_loss is not None]
    held_out = [row.epoch for row in validated]
    with _figure(path, (10, 6)) as figure:
        loss, top1, rate, gamma = figure.subplots(2, 2, sharex=True).flat
        loss.plot(epochs, [row.train_loss for row in history], ".-", label="training")
        loss.plot(held_out, [row.val_loss for row in validated], ".-", label="held out")
        loss.legend()
        top1.plot(held_out, [100 * (row.val_top1 or 0) for row in validated], ".-")
        rate.plot(epochs, [row.lr for row in history], ".-")
        gamma.plot(epochs, [row.gamma for row in history], ".-")
        titles = ("loss", "top-1 of held-out images, %", "learning rate", "γ")
        for axes, title in zip((loss, top1, rate, gamma), titles, strict=True):
            axes.set_title(title)
            axes.xaxis.get_major_locator().set_params(integer=True)
        for axes in (rate, gamma):
            axes.set(xlabel="epoch")


def draw_confusion(scores: Scores, path: Path) -> None:
    """The share of each class's images that is said to be each class."""
    shown = _choose_classes(scores)
    names = [_shorten(scores.classes[n].name) for n in shown]
    counts = [[scores.confusion[row][column] for column in shown] for row in shown]
    totals = [max(1, sum(scores.confusion[row])) for row in shown]
    shares = [[count / t for count in row] for row, t in zip(counts, totals, strict=True)]
    side = 3 + 0.28 * len(shown)
    with _figure(path, (side + 1, side)) as figure:
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        figure.colorbar(image, label="share of the row's images")
        ticks = range(len(shown))
        axes.set_xticks(ticks, names, rotation=90)
        axes.set_yticks(ticks, names)
        axes.set(xlabel="said", ylabel="is")
        if len(shown) < len(scores.classes):
            axes.set(title=f"the {len(shown)} most confused of {len(scores.classes)} classes")
        for row, column in ((r, c) for r in ticks for c in ticks if len(shown) <= _MOST_COUNTS):
            colour = "white" if shares[row][column] > 0.5 else "black"
            number = str(counts[row][column])
            axes.text(column, row, number, ha="center", va="center", color=colour)


def draw_mistakes(mistakes: Sequence[Mistake], path: Path) -> None:
    """The images themselves, with what was said and what is right."""
    rows = math.ceil(len(mistakes) / _COLUMNS)
    with _figure(path, (2.4 * _COLUMNS, 3 * rows)) as figure:
        grid = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
        for axes in grid:
            axes.axis("off")
        for axes, mistake in zip(grid, mistakes, strict=False):
            image = decode(mistake.path)
            image.thumbnail((_SIDE, _SIDE))
            axes.imshow(image)
            said = f"said {_shorten(mistake.said)} ({mistake.probability:.0%})"
            axes.set_title(f"{said}\nis {_shorten(mistake.truth)}", fontsize=9)


def draw_memory(plan: BatchPlan, path: Path) -> None:
    """The peak of a training step, as predicted and as measured, and the limit."""
    amounts = {"predicted": plan.predicted_bytes, "measured": plan.measured_bytes}
    known = {name: amount / 2**20 for name, amount in amounts.items() if amount is not None}
    known["limit"] = plan.limit_bytes / 2**20
    with _figure(path, (8, 2.4)) as figure:
        axes = figure.subplots()
        colours = ["tab:blue"] * (len(known) - 1) + ["lightgrey"]
        bars = axes.barh([*known], [*known.values()], color=colours)
        axes.bar_label(bars, fmt="%.0f MiB", padding=3)
        axes.set(xlabel="MiB at the peak of a training step", xlim=(0, 1.15 * max(known.values())))
        axes.invert_yaxis()


def _choose_classes(scores: Scores) -> list[int]:
    """All classes, or those that are most often taken for others, or others for them."""
    numbers = range(len(scores.classes))
    if len(numbers) <= _MOST_CLASSES:
        return list(numbers)
    columns: list[tuple[int, ...]] = list(zip(*scores.confusion, strict=True))

    def count_errors(n: int) -> int:
        row, column = scores.confusion[n], columns[n]
        return sum(row) + sum(column) - row[n] - column[n]

    return sorted(sorted(numbers, key=count_errors, reverse=True)[:_MOST_CLASSES])


def _shorten(name: str) -> str:
    text = printable(name)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 1]}…"


@contextmanager
def _figure(path: Path, inches: tuple[float, float]) -> Iterator["Figure"]:
    """An empty figure, which is written to ``path`` in the end."""
    import matplotlib
    from matplotlib.figure import Figure

    # Names are text, whatever signs are in them, and even if the font lacks some.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        write_atomically(path, _save(figure))


def _save(figure: "Figure") -> Callable[[Path], None]:
    return lambda target: figure.savefig(target, format="png", dpi=100)

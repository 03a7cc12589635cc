"""A run in pictures. Only this module and ``memory_plot`` draw."""

import csv
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.v2.functional import to_pil_image

from momconv.data.dataset import LabelledImages
from momconv.data.decoding import decode, read_bytes
from momconv.data.source import ImageSet
from momconv.data.transforms import training_transform
from momconv.evaluation import Mistake, Scores
from momconv.files.atomic import write_atomically
from momconv.planner.plan import Plan
from momconv.planner.prediction import PeakMemory
from momconv.recipe import Recipe
from momconv.training.progress import EpochRow, ProbeScore
from momconv.words import printable
from momconv.zoo.description import Preprocessing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CLASSES = 30  # above, only those that are confused most
_MOST_COUNTS = 12  # classes, up to which the counts are written in
_EXAMPLES = 15  # images
_COLUMNS = 5  # of them
_CELL = 240  # pixels of an image with its words
_SIDE = 190  # pixels of the image
_TITLE = 44  # pixels above the images
_TEXT = 13  # pixels of the words' height
_DPI = 100
_MIB = 2**20
_LENGTH = 24  # characters of a class
_REST, _WHOLE = "activations and the rest", "not divided"  # of a peak, in grey


def draw_curves(history: Sequence[EpochRow], path: Path, probe: ProbeScore | None) -> None:
    """Draw loss, top-1 and macro F1, learning rate and, where it changes, γ over the epochs.

    The top-1 of a ``probe`` is a line to compare with.
    """
    epochs = [row.epoch for row in history]
    validated = [row for row in history if row.val_loss is not None]
    held_out = [row.epoch for row in validated]
    titles = ["loss", "scores of held-out images, %", "learning rate"]
    titles += ["γ"] if len({row.gamma for row in history}) > 1 else []
    with _figure(path, (4 * len(titles), 3)) as figure:
        loss, top1, rate, *gamma = panels = figure.subplots(1, len(titles))
        loss.plot(epochs, [row.train_loss for row in history], ".-", label="training")
        loss.plot(held_out, [row.val_loss for row in validated], ".-", label="held out")
        loss.legend()
        top1.plot(held_out, [100 * (row.val_top1 or 0) for row in validated], ".-", label="top-1")
        f1 = [100 * row.val_macro_f1 if row.val_macro_f1 is not None else None for row in validated]
        top1.plot(held_out, f1, ".--", label="macro F1")
        if probe:
            top1.axhline(100 * probe.top1, color="grey", linestyle=":", label="linear probe")
        top1.legend()
        rate.plot(epochs, [row.lr for row in history], ".-")
        for axes in gamma:
            axes.plot(epochs, [row.gamma for row in history], ".-")
        for axes, title in zip(panels, titles, strict=True):
            axes.set(title=title, xlabel="epoch", xlim=(0.5, epochs[-1] + 0.5))
            axes.xaxis.get_major_locator().set_params(integer=True)


def draw_confusion(scores: Scores, path: Path) -> None:
    """Draw the share of each class's images that is said to be each class."""
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
        all_ = len(shown) == len(scores.classes)
        which = "" if all_ else f" ({len(shown)} most confused of {len(scores.classes)} classes)"
        axes.set(xlabel="said", ylabel="is", title=f"What is taken for what{which}")
        for row, column in ((r, c) for r in ticks for c in ticks if len(shown) <= _MOST_COUNTS):
            colour = "white" if shares[row][column] > 0.5 else "black"
            number = str(counts[row][column])
            axes.text(column, row, number, ha="center", va="center", color=colour)


def draw_mistakes(
    mistakes: Sequence[Mistake],
    p: Preprocessing,
    path: Path,
    read: Callable[[Path], bytes] = read_bytes,
) -> None:
    """Draw the images themselves, with what was said and what is right."""
    texts = [
        f"said {_shorten(m.said)} ({m.probability:.0%})\nis {_shorten(m.truth)}" for m in mistakes
    ]
    images = (decode(mistake.path, p.ranges, read) for mistake in mistakes)
    _draw_images("The surest mistakes", images, texts, path)


def draw_training_images(images: ImageSet, p: Preprocessing, recipe: Recipe, path: Path) -> None:
    """Draw some images as in the first epoch, with their classes; not yet mixed."""
    data, total = recipe.data, len(images.samples)
    count = min(_EXAMPLES, total)
    transform = training_transform(p, level=data.augment, flip=data.flip)
    dataset = LabelledImages(images, transform, seed=recipe.train.seed, ranges=p.ranges)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (p.mean, p.std))
    numbers = [number * total // count for number in range(count)]
    pictures = (to_pil_image((dataset[n][0] * std + mean).clamp(0, 1)) for n in numbers)
    names = [_shorten(images.classes[images.samples[n].label]) for n in numbers]
    title = f"Training images as in the first epoch (augment: {data.augment})"
    _draw_images(title, pictures, names, path)


def draw_rates(table: Path, chosen: float, path: Path) -> None:
    """Draw the loss at the learning rates that were tried, and the rate that was chosen."""
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr"]) for row in rows]
    with _figure(path, (6, 3.5)) as figure:
        axes = figure.subplots()
        axes.plot(rates, [float(row["loss"]) for row in rows], ".", label="loss of a step")
        axes.plot(rates, [float(row["smoothed"]) for row in rows], label="smoothed")
        axes.axvline(chosen, color="tab:green", label=f"chosen: {chosen:g}")
        axes.set(xscale="log", xlabel="learning rate", title="Loss at the rates that were tried")
        axes.xaxis.set_major_formatter("{x:g}")  # the usual one writes formulas
        axes.xaxis.set_minor_formatter("")
        axes.legend()


def _draw_images(
    title: str, images: Iterable[Image.Image], texts: Sequence[str], path: Path
) -> None:
    from matplotlib.font_manager import findfont

    font = ImageFont.truetype(findfont("DejaVu Sans"), _TEXT)  # which comes with matplotlib
    width, height = _COLUMNS * _CELL, _TITLE + math.ceil(len(texts) / _COLUMNS) * _CELL
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((width / 2, 10), title, "black", font.font_variant(size=18), anchor="ma")
    for number, (image, text) in enumerate(zip(images, texts, strict=True)):
        x, y = _CELL * (number % _COLUMNS), _TITLE + _CELL * (number // _COLUMNS)
        small = _shrink(image)
        sheet.paste(small, (x + (_CELL - small.width) // 2, y))
        place = (x + _CELL / 2, y + _SIDE + 4)
        draw.text(place, text, "black", font, anchor="ma", align="center")
    write_atomically(path, lambda target: sheet.save(target, "PNG"))


def _shrink(image: Image.Image) -> Image.Image:
    """Return ``image`` with a longer side of ``_SIDE``; a strip keeps one pixel of the other."""
    width, height = (max(1, round(length * _SIDE / max(image.size))) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def draw_memory(plan: Plan, peaks: Mapping[str, PeakMemory], path: Path) -> None:
    """Draw the peak of a training step in each way by its parts, what was measured, and the limit.

    Without ``peaks`` the one that was predicted is not divided, and the other may not be.
    """
    bars = {name: split_peak(peak) for name, peak in peaks.items()}
    bars |= {} if bars else {"predicted": {_WHOLE: plan.predicted_bytes}}
    if plan.measured_bytes is not None:
        bars["measured"] = split_measured(plan) or {_WHOLE: plan.measured_bytes}
    images = plan.request.largest_part(plan.micro_batch)
    limit, left = plan.limit_bytes / _MIB, dict.fromkeys(bars, 0.0)
    with _figure(path, (8, 1.6 + 0.45 * len(bars))) as figure:
        axes = figure.subplots()
        for part in dict.fromkeys(part for bar in bars.values() for part in bar):
            widths = {name: bar.get(part, 0) / _MIB for name, bar in bars.items()}
            if any(widths.values()):
                color, begins = "grey" if part in (_REST, _WHOLE) else None, [*left.values()]
                axes.barh([*bars], [*widths.values()], left=begins, label=part, color=color)
                left = {name: left[name] + width for name, width in widths.items()}
        for place, total in enumerate(left.values()):
            axes.text(total, place, f" {total:.0f} MiB", va="center")
        largest = max(left.values())
        if limit < 1.5 * largest:
            axes.axvline(limit, color="tab:red", linestyle="--", label="limit")
        axes.set(
            title=f"Peak of a training step of {images} images, predicted",
            xlabel="MiB",
            xlim=(0, 1.18 * max(largest, limit if limit < 1.5 * largest else 0)),
        )
        axes.invert_yaxis()
        if peaks:
            axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))


def split_peak(peak: PeakMemory) -> dict[str, int]:
    """Return the parts of a peak in bytes, under what people call them."""
    return {
        "weights": peak.weights + peak.ema,
        "gradients": peak.gradients,
        "optimiser state": peak.optimizer,
        "images": peak.batch,
        "activations": sum(peak.activations.values()),
        "side information": peak.side_information,
        "gathered weights and gradients": peak.gathered,
        "recomputed and scratch": peak.transients,
        "context and fragmentation": peak.allowance,
    }


def split_measured(plan: Plan) -> dict[str, int]:
    """Return the parts of the peak that was measured, as far as they were; none if it was not."""
    static, peak = plan.measured_static_bytes, plan.measured_bytes
    if static is None or peak is None:
        return {}
    return {
        "weights": static.weights + static.ema,
        "gradients": static.gradients,
        "optimiser state": static.optimizer,
        _REST: peak - static.total,
    }


def _choose_classes(scores: Scores) -> list[int]:
    """Return all classes, or those that are most often taken for others, or others for them."""
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
    """Give an empty figure, which is written to ``path`` in the end."""
    import matplotlib
    from matplotlib.figure import Figure

    # Names are text, whatever signs are in them, and even if the font lacks some.
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        figure = Figure(figsize=inches, layout="constrained")
        yield figure
        write_atomically(path, _save(figure))


def _save(figure: "Figure") -> Callable[[Path], None]:
    return lambda target: figure.savefig(target, format="png", dpi=_DPI)

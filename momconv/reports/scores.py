"""Scores as tables that stay readable with a thousand classes."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from momconv.evaluation import ClassScore, Mistake, Scores
from momconv.words import describe_classes, plural, printable

_MOST_ROWS = 30  # above, only the worst classes
_WORST = 10
_MOST_COLUMNS = 10  # above, the confusions as a list


def show_scores(scores: Scores, remark: str = "") -> Iterator[RenderableType]:
    """Yield the figures for all images, for each class, what is taken for what, the worst mistakes.

    A ``remark`` on all of it stands below the first ones.
    """
    low, high = scores.interval
    top5 = f", top-5 {scores.top5:.2%}" if scores.top5 is not None else ""
    yield Text(
        f"top-1 {scores.top1:.2%} (95 % interval {low:.1%} to {high:.1%}) "
        f"on {plural(scores.n, 'image')}{top5}\nmacro F1 {scores.macro_f1:.3f} · "
        f"calibration error {scores.calibration_error:.3f} · loss {scores.loss:.4f}"
    )
    if uncovered := scores.uncovered:
        yield Text(f"not covered, as they have no image here: {describe_classes(uncovered)}")
    if remark:
        yield Text(remark)
    shown, title = scores.classes, "each class"
    if len(shown) > _MOST_ROWS:
        present = [score for score in shown if score.support]
        shown = tuple(sorted(present, key=_worth)[:_WORST])
        title = f"the {len(shown)} worst of {len(scores.classes)} classes"
    yield Text(f"\n{title}")
    yield _tabulate_classes(shown)
    if len(scores.classes) <= _MOST_COLUMNS:
        yield Text("\nconfusion")
        yield _tabulate_confusion(scores)
    elif confusions := _find_confusions(scores):
        yield Text("\nthe most frequent confusions")
        yield _tabulate_confusions(scores, confusions)
    if scores.mistakes:
        yield Text("\nthe most confident mistakes")
        yield from map(_describe, scores.mistakes)


def confusion_to_csv(scores: Scores) -> str:
    """Return how many images of each class, a line, are said to be of each class, a column."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    names = [printable(score.name) for score in scores.classes]
    writer.writerow(["class", *names])
    for name, counts in zip(names, scores.confusion, strict=True):
        writer.writerow([name, *counts])
    return table.getvalue()


def compare_scores(scores: Mapping[Path, Scores]) -> Iterator[RenderableType]:
    """Yield the scores of several networks side by side, and on how many images they agree."""
    numbers = range(1, 1 + len(scores))
    titles = ("top-1", "95 % interval", "macro F1", "calibration error", "loss")
    table = _make_table("", *titles, *(f"same as {n}" for n in numbers[:-1]))
    for number, own in zip(numbers, scores.values(), strict=True):
        low, high = own.interval
        figures = (own.macro_f1, own.calibration_error, own.loss)
        others = (f"{own.agreement(other):.1%}" for other in [*scores.values()][: number - 1])
        shown = (f"{own.top1:.2%}", f"{low:.1%} to {high:.1%}", *(f"{x:.3f}" for x in figures))
        table.add_row(str(number), *shown, *others)
    yield table
    for number, path in zip(numbers, scores, strict=True):
        yield Text(f"{number}  {printable(path)}")
    yield Text(f"\n{printable(next(iter(scores)))}")


def _describe(mistake: Mistake) -> Text:
    names = f"said {printable(mistake.said)}, is {printable(mistake.truth)}"
    return Text(f"{printable(mistake.path)}: {names} ({mistake.probability:.1%})")


def _tabulate_classes(shown: Sequence[ClassScore]) -> Table:
    table = _make_table("class", "images", "precision", "recall", "F1")
    for score in shown:
        figures = (f"{value:.3f}" for value in (score.precision, score.recall, score.f1))
        table.add_row(_name(score.name), str(score.support), *figures)
    return table


def _tabulate_confusion(scores: Scores) -> Table:
    names = [score.name for score in scores.classes]
    table = _make_table("true \\ predicted", *map(printable, names))
    for name, row in zip(names, scores.confusion, strict=True):
        table.add_row(_name(name), *map(str, row))
    return table


def _tabulate_confusions(scores: Scores, confusions: list[tuple[int, int, int]]) -> Table:
    table = _make_table("true", "taken for", "images")
    table.columns[1].justify = "left"
    for count, true, predicted in confusions:
        names = (_name(scores.classes[label].name) for label in (true, predicted))
        table.add_row(*names, str(count))
    return table


def _find_confusions(scores: Scores) -> list[tuple[int, int, int]]:
    """Return the largest entries beside the diagonal, as (images, true, predicted)."""
    wrong = [
        (count, true, predicted)
        for true, row in enumerate(scores.confusion)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return sorted(wrong, key=lambda entry: (-entry[0], *entry[1:]))[:_WORST]


def _make_table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(Text(first), overflow="fold")
    for name in others:
        table.add_column(Text(name), justify="right", overflow="fold")
    return table


def _name(name: str) -> Text:
    return Text(printable(name))


def _worth(score: ClassScore) -> tuple[float, str]:
    return score.f1, score.name

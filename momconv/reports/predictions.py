"""What a network says about images, for people and for spreadsheets."""

import csv
import io

from rich.table import Table
from rich.text import Text

from momconv.names import encode_name
from momconv.prediction import Guess, Predictions
from momconv.words import printable


def tabulate_predictions(predictions: Predictions) -> Table:
    """Return a row for each image: the class that is said, and those that come next."""
    table = Table("image", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("then", overflow="fold")
    for image in predictions.images:
        first, *others = image.guesses
        then = ", ".join(map(_describe, others))
        name, said = Text(printable(image.path)), Text(printable(first.name))
        table.add_row(name, said, f"{first.probability:.1%}", Text(then, style="dim"))
    return table


def to_csv(predictions: Predictions) -> str:
    """Return a line for each image, with two columns for each class that is named, or the error."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    ranks = range(1, 1 + max((len(image.guesses) for image in predictions.images), default=0))
    columns = [f"{what}_{n}" for n in ranks for what in ("class", "probability")]
    writer.writerow(["path", *columns, "error"])
    for image in predictions.images:
        pairs = ((guess.name, guess.probability) for guess in image.guesses)
        writer.writerow([encode_name(image.path), *(value for pair in pairs for value in pair), ""])
    for bad in predictions.unreadable:
        writer.writerow([encode_name(bad.path), *("" for _ in columns), bad.error])
    return table.getvalue()


def _describe(guess: Guess) -> str:
    return f"{printable(guess.name)} {guess.probability:.1%}"

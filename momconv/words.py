"""Names and numbers of things in messages."""

from collections.abc import Sequence
from pathlib import Path


def printable(name: str | Path) -> str:
    r"""``name`` on one line, with what a terminal would obey or could not show written out.

    >>> print(printable("two\nlines\x1b[31m"))
    two\nlines\x1b[31m
    """
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(name)
    )


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "class"), plural(2, "class"), plural(0, "image")
    ('1 class', '2 classes', '0 images')
    """
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def name_some(names: Sequence[str], most: int = 5) -> str:
    """The first ``most`` of the names in a line, and how many more there are.

    >>> name_some(["a", "b", "c"]), name_some(["a", "b", "c"], 1)
    ('a, b, c', 'a and 2 more')
    """
    shown, more = ", ".join(map(printable, names[:most])), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def describe_classes(names: Sequence[str]) -> str:
    """How many classes, and a few of their names.

    >>> describe_classes(["ant"]), describe_classes(["ant", "bee"])
    ('1 class: ant', '2 classes: ant, bee')
    """
    return f"{plural(len(names), 'class')}: {name_some(names)}"


def list_some(lines: Sequence[str], most: int) -> list[str]:
    """The first ``most`` of the lines, and how many more there are.

    >>> list_some(["a", "b", "c"], 3), list_some(["a", "b", "c"], 1)
    (['a', 'b', 'c'], ['a', 'and 2 more'])
    """
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]

"""Names and numbers of things in messages."""

import difflib
import os
import reprlib
from collections.abc import Sequence
from pathlib import Path

from momconv.names import show_byte

_SCREEN = 1600  # characters
_ROWS = 20

# Looks at a few items of each list alone, however often the same one is in it.
_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict = 3, 4, 4
_short.maxstring = _short.maxother = _short.maxlong = 80


def quoted(value: object) -> str:
    """Return ``value`` of the user's as Python writes it, and a long one without its middle.

    >>> quoted("auto"), quoted(["a", ["b"]]), len(quoted("x" * 100_000))
    ("'auto'", "['a', ['b']]", 80)
    """
    return abridge(_short.repr(value), 160)


def abridge(text: str, most: int) -> str:
    """Return ``text``, without its middle if it has more than ``most`` characters.

    >>> abridge("0123456789", 10), abridge("0123456789", 7)
    ('0123456789', '012…789')
    """
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - head - 1) :]}"


def fit_screen(message: str) -> str:
    """Return ``message``, with no more lines, nor characters in them, than a person sees at once.

    >>> fit_screen("a short one"), len(fit_screen("x" * 100_000))
    ('a short one', 1600)
    """
    if len(message) <= _SCREEN and message.count("\n") < _ROWS:
        return message
    lines = list_some(message.split("\n"), _ROWS)
    return "\n".join(abridge(line, _SCREEN // len(lines)) for line in lines)


def printable(name: str | Path) -> str:
    r"""Return ``name`` on one line, with what a terminal would obey or could not show written out.

    >>> print(printable("two\nlines\x1b[31m"))
    two\nlines\x1b[31m
    """
    return "".join(char if char.isprintable() else _write_out(char) for char in str(name))


def _write_out(char: str) -> str:
    byte = show_byte(char)
    return byte if byte != char else char.encode("unicode_escape").decode()


def find_like(path: Path) -> Path | None:
    """Return what exists beside ``path``, which does not, and is called like it, if anything."""
    folder = next(parent for parent in path.parents if os.path.isdir(parent))
    names = [found.name for found in folder.glob("*") if os.path.exists(found)]
    nearest = difflib.get_close_matches(path.relative_to(folder).parts[0], names, n=1)
    return folder / nearest[0] if nearest else None


def plural(count: int, noun: str) -> str:
    """Return a number of things.

    >>> plural(1, "class"), plural(2, "class"), plural(0, "image")
    ('1 class', '2 classes', '0 images')
    """
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{ending}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return ``rows`` as lines of columns.

    >>> print(align([["plain", "6 GiB", "yes"], ["momentum", "1.4 GiB", "no"]]))
    plain     6 GiB    yes
    momentum  1.4 GiB  no
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def name_some(names: Sequence[str | Path], most: int = 5) -> str:
    """Return the first ``most`` of the names in a line, and how many more there are.

    >>> name_some(["a", "b", "c"]), name_some(["a", "b", "c"], 1)
    ('a, b, c', 'a and 2 more')
    """
    shown, more = ", ".join(map(printable, names[:most])), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def describe_classes(names: Sequence[str]) -> str:
    """Return how many classes, and a few of their names.

    >>> describe_classes(["ant"]), describe_classes(["ant", "bee"])
    ('1 class: ant', '2 classes: ant, bee')
    """
    return f"{plural(len(names), 'class')}: {name_some(names)}"


def list_some(lines: Sequence[str], most: int) -> list[str]:
    """Return the first ``most`` of the lines, and how many more there are.

    >>> list_some(["a", "b", "c"], 3), list_some(["a", "b", "c"], 1)
    (['a', 'b', 'c'], ['a', 'and 2 more'])
    """
    more = [f"and {len(lines) - most} more"] if len(lines) > most else []
    return [*lines[:most], *more]


def itemise(lines: Sequence[str], most: int) -> str:
    """Return what ``list_some`` does, a line each, below the line that they belong to.

    >>> print(itemise(["a", "b", "c"], 1))
      a
      and 2 more
    """
    return "\n".join(f"  {line}" for line in list_some(lines, most))

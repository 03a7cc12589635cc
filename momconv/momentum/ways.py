"""How a stage gives backward its activations, as a value and as text.

The text is a strategy, how many blocks belong together, how many are stored and whether blocks are
computed in parts: "store", "checkpoint:3", "momentum+store:5", "segment:6+store:2+parts".
"""

import re
from dataclasses import dataclass
from typing import Self, cast, get_args

from momconv.errors import UsageError
from momconv.vocabulary import Strategy

_TEXT = re.compile(r"([a-z]+)(?::([1-9]\d*))?(?:\+store:([1-9]\d*))?(\+parts)?")
_DIVIDED = ("checkpoint", "segment")


@dataclass(frozen=True, slots=True)
class Way:
    """What a stage keeps, and what it computes again in backward.

    Attributes:
        strategy: See momconv.momentum.autograd.
        length: Of the blocks outside of momentum runs, so many in succession share a checkpoint or
            are a segment; 0: one block has a checkpoint, and the whole stage is a segment.
        stored: So many blocks at the end of the stage are stored.
        in_parts: Whether blocks that are computed again may be so in two parts, one after the
            other, which takes less memory and more time; see faster/parts.py.

    >>> way = Way.parse("momentum+store:5")
    >>> way, str(way)
    (Way(strategy='momentum', length=0, stored=5, in_parts=False), 'momentum+store:5')
    """

    strategy: Strategy
    length: int = 0
    stored: int = 0
    in_parts: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the way that ``text`` says, as ``str`` writes it.

        Raises:
            UsageError: It is none.
        """
        match = _TEXT.fullmatch(text)
        name, length, stored, parts = match.groups() if match else (text, None, None, None)
        is_plain = not (length or stored or parts)
        if (
            name not in get_args(Strategy)
            or (length and name not in _DIVIDED)
            or (name == "store" and not is_plain)
        ):
            raise UsageError(
                f"unknown strategy {text!r}",
                kind="usage.bad_value",
                fix=f"one of {', '.join(get_args(Strategy))}, for a stage also as checkpoint:3,"
                " segment:6, momentum+store:5 or checkpoint+parts",
            )
        return cls(cast(Strategy, name), int(length or 0), int(stored or 0), bool(parts))

    def __str__(self) -> str:
        length = f":{self.length}" if self.length else ""
        stored = f"+store:{self.stored}" if self.stored else ""
        return f"{self.strategy}{length}{stored}{'+parts' if self.in_parts else ''}"

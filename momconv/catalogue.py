"""The networks that momconv converts and what that saves, from a table that comes along.

``python -m benchmarks.catalogue`` predicts the table, which takes minutes; to read it takes no
PyTorch.
"""

import json
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("catalogue.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What a training step allocates for an image, in bytes; weights and the like not counted.

    Attributes:
        resolution: Pixels of the image's sides.
        store_bytes: In the plain network with everything stored.
        auto_bytes: In the converted one, under "auto".
        relative_seconds: The time of its step, about, as a multiple of the plain network's.
    """

    resolution: int
    store_bytes: int
    auto_bytes: int
    relative_seconds: float

    @property
    def saved(self) -> float:
        """The share of the memory that is saved; below 0 where the conversion costs memory."""
        return 1 - self.auto_bytes / self.store_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry(Saving):
    """One network, and what its conversion saves at its own resolution.

    Attributes:
        name: As for ``momconv convert``.
        parameters: How many numbers it learns.
        runs: How many runs of residual blocks it has.
        deepest: The blocks of the longest of them.
    """

    name: str
    parameters: int
    runs: int
    deepest: int


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All entries in the order of their names, and what predicted them.

    Attributes:
        predicted_by: Versions by the name of the package.
        images: Of the step that is predicted.
        entries: Of all networks.
    """

    predicted_by: dict[str, str]
    images: int
    entries: tuple[Entry, ...]


def read_catalogue() -> Catalogue:
    """Return what is in the table."""
    document = json.loads(TABLE.read_text(encoding="utf-8"))
    entries = tuple(Entry(**entry) for entry in document["models"])
    return Catalogue(document["predicted_by"], document["images"], entries)

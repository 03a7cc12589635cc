"""What was found in image files, in columns: there may be millions of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from momconv.data.values import Values

if TYPE_CHECKING:
    from numpy.typing import NDArray

DIGEST = 32  # bytes of a SHA-256
_NONE = bytes(DIGEST)  # where there were no bytes to read


@dataclass(frozen=True, slots=True)
class Finding:
    """What is in one file.

    Attributes:
        sha256: Of its bytes; empty where they cannot be read.
        problem: Why it cannot be decoded; None if it can.
        stored: The format and mode in the file, such as ``JPEG CMYK``.
        size: Width and height in pixels, upright.
        converted: What had to be converted to get 8-bit RGB.
        values: What values it has, if not 8-bit ones.
    """

    sha256: str
    problem: str | None = None
    stored: str = ""
    size: tuple[int, int] = (0, 0)
    converted: tuple[str, ...] = ()
    values: Values | None = None


class Findings(Mapping[Path, Finding]):
    """The finding of each path: 44 bytes of it, and a row of ``kinds`` that many have in common.

    Attributes:
        names: The paths as text.
        digests: The SHA-256 of each file, one behind the other.
        sizes: Width and height of each.
        kind: Which of the ``kinds`` each is.
        kinds: What else can be found, as findings without SHA-256 and size.
    """

    def __init__(
        self,
        names: Iterable[str],
        digests: bytes,
        sizes: "NDArray[np.int32]",
        kind: "NDArray[np.int32]",
        kinds: Sequence[Finding],
    ) -> None:
        self.names, self.digests = tuple(names), digests
        self.sizes, self.kind, self.kinds = sizes, kind, tuple(kinds)

    @classmethod
    def collect(cls, found: Iterable[tuple[str, Finding]]) -> "Findings":
        """Return the findings of files by their names."""
        names, digests, sizes, kind = list[str](), bytearray(), list[int](), list[int]()
        kinds: dict[Finding, int] = {}
        for name, finding in found:
            names.append(name)
            digests += bytes.fromhex(finding.sha256) or _NONE
            sizes += finding.size
            common = replace(finding, sha256="", size=(0, 0))
            kind.append(kinds.setdefault(common, len(kinds)))
        columns = np.array(sizes, np.int32).reshape(-1, 2), np.array(kind, np.int32)
        return cls(names, bytes(digests), *columns, [*kinds])

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.names)

    def __getitem__(self, path: Path) -> Finding:
        row = self._rows[str(path)]
        width, height = self.sizes[row].tolist()
        common = self.kinds[int(self.kind[row])]
        return replace(common, sha256=self._hex(row), size=(width, height))

    def __or__(self, other: "Findings") -> "Findings":
        """Return these and those of ``other`` files that are not among them."""
        if any(name in self._rows for name in other.names):
            other = other.select([name for name in other.names if name not in self._rows])
        ours = {*self.kinds}
        kinds = [kind for kind in other.kinds if kind not in ours]
        numbers = {kind: number for number, kind in enumerate((*self.kinds, *kinds))}
        renumbered = [numbers[kind] for kind in other.kinds]
        return Findings(
            (*self.names, *other.names),
            self.digests + other.digests,
            np.concatenate([self.sizes, other.sizes]),
            np.concatenate([self.kind, np.array(renumbered, np.int32)[other.kind]]),
            (*self.kinds, *kinds),
        )

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.names)}

    def sha256(self, path: Path) -> str:
        """Return the SHA-256 of ``path``, as its finding has it."""
        return self._hex(self._rows[str(path)])

    def sha256s(self, paths: Iterable[Path]) -> Iterator[str]:
        """Yield the SHA-256 of each of ``paths``, as their findings have it."""
        chosen = self.select([*map(str, paths)])
        return map(chosen._hex, range(len(chosen)))

    def find(self, names: Sequence[str]) -> "NDArray[np.int64]":
        """Return the row of each of ``names``; -1 where it is unknown."""
        return np.fromiter((self._rows.get(name, -1) for name in names), np.int64, len(names))

    def select(self, names: Sequence[str]) -> "Findings":
        """Return those of ``names``, which are known, in that order."""
        if tuple(names) == self.names:  # as they mostly are, of which there may be millions
            return self
        return self.take(self.find(names))

    def take(self, rows: "NDArray[np.int64]") -> "Findings":
        """Return those in ``rows``."""
        names = map(self.names.__getitem__, rows.tolist())
        digests = split_rows(self.digests, DIGEST)[rows].tobytes()
        used, kind = np.unique(self.kind[rows], return_inverse=True)
        kinds = [self.kinds[number] for number in used]
        return Findings(names, digests, self.sizes[rows], kind.astype(np.int32), kinds)

    def rename(self, names: Iterable[str]) -> "Findings":
        """Return the same under other ``names``."""
        return Findings(names, self.digests, self.sizes, self.kind, self.kinds)

    def where(self, test: Callable[[Finding], object]) -> dict[Path, Finding]:
        """Return those whose problem, values and the like pass the ``test``."""
        passed = np.array([bool(test(kind)) for kind in self.kinds], bool)
        paths = map(Path, compress(self.names, passed[self.kind]))
        return {path: self[path] for path in paths}

    def count_kinds(self) -> list[tuple[Finding, int]]:
        """Return the ``kinds`` that there are, with how many files are of each."""
        counts = np.bincount(self.kind, minlength=len(self.kinds)).tolist()
        return [(kind, count) for kind, count in zip(self.kinds, counts, strict=True) if count]

    def _hex(self, row: int) -> str:
        digest = self.digests[DIGEST * row : DIGEST * (row + 1)]
        return "" if digest == _NONE else digest.hex()


def split_rows(content: bytes, size: int) -> "NDArray[np.uint8]":
    """Return ``content`` as rows of ``size`` bytes."""
    return np.frombuffer(content, np.uint8).reshape(-1, size)

"""Which images a network was trained on, known by their content wherever they lie."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

_BYTES = 6  # of each SHA-256: among a million images, one in 300 million others is taken for one


@dataclass(frozen=True, slots=True)
class SeenImages:
    """What a network has seen, in training, calibration or distillation.

    Attributes:
        digests: The first bytes of the SHA-256 of each file's content, sorted, in Base64.
        complete: Whether there were no others: it began with random weights.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    digests: str = ""
    complete: bool = False

    @property
    def count(self) -> int:
        """How many images these are."""
        return len(base64.b64decode(self.digests)) // _BYTES

    def add(self, sha256s: Iterable[str]) -> SeenImages:
        """Return these images and those whose content has one of ``sha256s``, in hexadecimal."""
        every = self._split() | {_shorten(sha256) for sha256 in sha256s if sha256}
        return SeenImages(base64.b64encode(b"".join(sorted(every))).decode(), self.complete)

    def find(self, sha256s: Iterable[str]) -> set[str]:
        """Return those of ``sha256s`` that are of these images."""
        known = self._split()
        return {sha256 for sha256 in sha256s if _shorten(sha256) in known}

    def __post_init__(self) -> None:
        if len(base64.b64decode(self.digests, validate=True)) % _BYTES:
            raise ValueError("the digests of the images are cut")

    def _split(self) -> set[bytes]:
        data = base64.b64decode(self.digests)
        return {data[start : start + _BYTES] for start in range(0, len(data), _BYTES)}


def _shorten(sha256: str) -> bytes:
    return bytes.fromhex(sha256)[:_BYTES]

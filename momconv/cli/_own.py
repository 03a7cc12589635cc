"""Networks of the user's own, on the command line: ``--network FUNCTION --arg KEY=VALUE``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class Function:
    """The function that makes a network of the user's own; no name where there is none."""

    name: str | None
    arguments: list[str] | None

    def load(self, file: Path) -> "nn.Module":
        """Return the network in ``file``."""
        from momconv.files.model_file import load

        return load(file, self.make_for(file))

    def make_for(self, file: Path) -> "nn.Module | None":
        """Return what it makes, if ``file`` holds such a network."""
        from momconv.files.model_file import read_description
        from momconv.zoo.own import is_own, make, parse_arguments

        if self.name is None or not is_own(read_description(file).architecture):
            return None
        return make(self.name, parse_arguments(self.arguments or []))

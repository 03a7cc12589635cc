"""Networks of the user's own, on the command line: ``--network FUNCTION --arg KEY=VALUE``."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from momconv.cli._console import tell

if TYPE_CHECKING:
    from torch import nn

    from momconv.zoo.preparation import Preparation


@dataclass(frozen=True, slots=True)
class Function:
    """The function that makes a network of the user's own; no name where there is none."""

    name: str | None
    arguments: list[str] | None

    def load(self, file: Path) -> "nn.Module":
        """Return the network in ``file``."""
        from momconv.files.model_file import load

        return load(file, self.make_for(file))

    def load_prepared(self, file: Path, said: "Preparation") -> "nn.Module":
        """Return the network in ``file`` for images as is ``said``; tell if nobody says how."""
        from momconv.zoo.preparation import describe_assumption, prepare_as

        model = self.load(file)
        prepare_as(model, said)
        if text := describe_assumption(model):
            tell(text)
        return model

    def make_for(self, file: Path) -> "nn.Module | None":
        """Return what it makes, if ``file`` holds such a network."""
        from momconv.files.model_file import read_description
        from momconv.zoo.own import is_own, make, parse_arguments

        if self.name is None or not is_own(read_description(file).architecture):
            return None
        return make(self.name, parse_arguments(self.arguments or []))

"""What turning a momentum network back into a plain one did."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from momconv.names import encode_name
from momconv.reports.drift import describe_drift, show_facts, show_steps
from momconv.surgery.adaptation import Step
from momconv.surgery.certificate import Accuracy
from momconv.surgery.drift import Drift
from momconv.units import format_bytes
from momconv.words import plural, printable


@dataclass(frozen=True, slots=True)
class Reversion:
    """A momentum network's weights in a plain file.

    Attributes:
        architecture: What the file is of.
        num_classes: How many classes it has.
        source: The file that it was made from.
        steps: The effect of each step; "swapped" is the plain rule, without gains.
        drift: From the momentum network, in the end.
        accuracy: Of the momentum network ("original") and the plain one; None without labels.
        measured_on: The images that this was measured on, for people.
        interrupted: Whether Ctrl-C ended a step early.
        path: The file.
        bytes: Its size.
        python: What reads it.
    """

    architecture: str
    num_classes: int
    source: Path
    steps: tuple[Step, ...]
    drift: Drift
    accuracy: Accuracy | None
    measured_on: str
    interrupted: bool
    path: Path
    bytes: int
    python: str

    def show(self) -> Iterator[RenderableType]:
        """The steps, and what else is to be known."""
        yield from show_steps(self.steps)
        yield from show_facts(_facts(self))

    def to_json(self) -> dict[str, Any]:
        """The same as values that JSON knows."""
        return {
            **asdict(self),
            "source": str(self.source),
            "path": encode_name(self.path),
            "steps": [step.to_json() for step in self.steps],
            "drift": self.drift.to_json(),
        }


def _facts(reversion: Reversion) -> Iterator[tuple[str, str]]:
    classes = plural(reversion.num_classes, "class")
    yield "network", f"{reversion.architecture}, {classes}, from {printable(reversion.source)}"
    yield "momentum", "none: the plain rule, which has no gains"
    yield "agreement", describe_drift(reversion.drift, reversion.measured_on)
    if reversion.accuracy:
        before, after = reversion.accuracy.original, reversion.accuracy.converted
        yield "top-1", f"with momentum {before:.1%}, plain {after:.1%}"
    yield "written", f"{printable(reversion.path)} ({format_bytes(reversion.bytes)})"
    yield "Python", reversion.python

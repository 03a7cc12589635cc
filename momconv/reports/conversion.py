"""What a conversion did."""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from momconv.names import encode_name
from momconv.planner.saving import Saving
from momconv.reports.drift import describe_drift, show_facts, show_steps
from momconv.reports.stages import tabulate_stages
from momconv.surgery.adaptation import Step
from momconv.surgery.certificate import Certificate
from momconv.surgery.conversion import Stage
from momconv.surgery.ladder import LADDER, Attempt
from momconv.units import format_bytes
from momconv.words import plural, printable

_GOOD = 0.95  # agreement, below which something should be done
_MANY = 5000  # images, of which more hardly help
_EPOCHS = 6  # of distillation


@dataclass(frozen=True, slots=True)
class Calibration:
    """The images that the network was adapted on."""

    images: int
    layers: int  # of BatchNorm, with new statistics
    more: bool  # whether the folder may hold more images
    unreadable: tuple[str, ...]  # files that were left out, each with the reason


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that ended in a file.

    Attributes:
        architecture: What was converted.
        source: Where its weights came from.
        gamma: γ; 0 for a network that was kept plain.
        velocity: What v[0] is.
        gain: Whether blocks got gains.
        stages: What became of each stage.
        parameters: How many numbers the whole network learns.
        calibration: None where there was none.
        steps: The effect of each step.
        tried: Each γ that was tried to find the largest good enough; empty where it was given.
        interrupted: Whether Ctrl-C ended a step early.
        certificate: What the network is worth in the end.
        saving: The memory that it saves in training.
        measured_on: The images that it was measured on, for people.
        is_noise: Whether those are no pictures.
        command: What converts it the same way, but for γ and the steps.
        path: The file.
        bytes: Its size.
        options: What a command needs besides the file, after a space: a network of the user's own.
    """

    architecture: str
    source: str
    gamma: float
    velocity: str
    gain: bool
    stages: tuple[Stage, ...]
    parameters: int
    calibration: Calibration | None
    steps: tuple[Step, ...]
    tried: tuple[Attempt, ...]
    interrupted: bool
    certificate: Certificate
    saving: Saving
    measured_on: str
    is_noise: bool
    command: str
    path: Path
    bytes: int
    options: str = ""

    @property
    def next_commands(self) -> tuple[str, ...]:
        """What can be done with the file."""
        file = f"{shlex.quote(str(self.path))}{self.options}"
        return (
            f"momconv eval {file} --data FOLDER",
            f"momconv finetune --from {file} --data FOLDER",
            f"momconv profile-memory {file}",
        )

    @property
    def remedies(self) -> tuple[str, ...]:
        """Commands that bring the network closer to its original, where it is far from it."""
        pointless = self.source == "none" or not self.gamma
        if pointless or self.is_noise or self.certificate.drift.agreement >= _GOOD:
            return ()
        same = f"{self.command} --gamma {self.gamma:g}"
        if self.calibration is None:
            return (f"{same} --calibrate FOLDER",)
        commands = []
        if all(step.name != "distilled" for step in self.steps):
            commands.append(f"{same} --distill {_EPOCHS}")
        if self.calibration.more and self.calibration.images < _MANY:
            commands.append(f"{same} --max-images {_MANY}")
        if smaller := [gamma for gamma in LADDER if gamma < self.gamma]:
            commands.append(f"{self.command} --gamma {smaller[0]:g}")
        return tuple(commands)

    def show(self) -> Iterator[RenderableType]:
        """A table of the stages, one of the steps, and what else was done."""
        yield tabulate_stages(self.stages, self.parameters, self.certificate)
        yield Text()
        yield from show_steps(self.steps)
        yield from show_facts(_facts(self))

    def to_json(self) -> dict[str, Any]:
        """The same as values that JSON knows."""
        tried = [{"gamma": a.gamma, "drift": a.drift.to_json()} for a in self.tried]
        return {
            **asdict(self),
            "path": encode_name(self.path),
            "steps": [step.to_json() for step in self.steps],
            "tried": tried,
            "certificate": self.certificate.to_json(),
            "gradients_exact": self.certificate.gradients_exact,
            "next_commands": self.next_commands,
            "remedies": self.remedies,
        }


def _facts(conversion: Conversion) -> Iterator[tuple[str, str]]:
    certificate = conversion.certificate
    yield "network", f"{conversion.architecture}, weights {printable(conversion.source)}"
    if conversion.gamma == 0:
        yield "momentum", "none: γ is 0, the plain network"
    else:
        v = "0" if conversion.velocity == "zero" else "f(x[0])"
        gains = "with a gain for each block" if conversion.gain else "without gains"
        yield "momentum", f"γ {conversion.gamma:g}, v[0] = {v}, {gains}"
    if conversion.tried:
        tried = (f"γ {a.gamma:g} {a.drift.agreement:.1%}" for a in conversion.tried)
        yield "tried", ", ".join(tried)
    yield "BatchNorm", _describe_calibration(conversion.calibration)
    yield "agreement", describe_drift(certificate.drift, conversion.measured_on)
    if certificate.accuracy:
        before, after = certificate.accuracy.original, certificate.accuracy.converted
        yield "top-1", f"original {before:.1%}, converted {after:.1%}"
    if certificate.gradients_exact:
        stages = plural(len(certificate.stages), "stage")
        yield "gradients", f"bit for bit those of ordinary backpropagation, in {stages} and outside"
    if conversion.gamma:
        yield "memory", _describe_saving(conversion.saving)
    yield "written", f"{printable(conversion.path)} ({format_bytes(conversion.bytes)})"
    yield from zip(("next", "", ""), conversion.next_commands, strict=True)


def _describe_saving(saving: Saving) -> str:
    size = f"{saving.resolution} × {saving.resolution}"
    return (
        f"{format_bytes(saving.auto_bytes)} for an image of {size} in training, "
        f"{format_bytes(saving.store_bytes)} in the plain network: {saving.saved:.0%} saved, "
        f"for about {saving.relative_seconds:.2g} times the time"
    )


def _describe_calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "statistics of the original network; --calibrate FOLDER re-estimates them"
    if calibration.layers == 0:
        return "the original's statistics, which come closer to it than re-estimated ones"
    layers = plural(calibration.layers, "layer")
    return f"statistics of {layers} re-estimated on {plural(calibration.images, 'image')}"

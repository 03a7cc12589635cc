"""What a conversion did, or turning a momentum network back into a plain one."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from momconv.catalogue import Saving
from momconv.momentum.ranging import FINENESS
from momconv.names import encode_name
from momconv.surgery.adaptation import LADDER, AdaptationStep, Attempt
from momconv.surgery.certificate import Accuracy, Certificate, StageCertificate
from momconv.surgery.conversion import Stage
from momconv.surgery.drift import Drift
from momconv.units import format_bytes
from momconv.words import plural, printable

_GOOD = 0.95  # agreement, below which something should be done
_MANY = 5000  # images, of which more hardly help
_EPOCHS = 6  # of distillation
_TOLD = {
    "swapped": "rule swapped",
    "statistics": "statistics chosen",
    "refined": "layers fitted, gains and norms refined",
    "distilled": "distilled",
}


@dataclass(frozen=True, slots=True)
class CalibrationReport:
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
    calibration: CalibrationReport | None
    steps: tuple[AdaptationStep, ...]
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
        """Yield a table of the stages, one of the steps, and what else was done."""
        yield tabulate_stages(self.stages, self.parameters, self.certificate)
        yield Text()
        yield from show_steps(self.steps)
        yield from show_facts(_facts(self))

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
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
    if certificate.rounding is not None:
        yield "rounding", describe_rounding(certificate.rounding)
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


def _describe_calibration(calibration: CalibrationReport | None) -> str:
    if calibration is None:
        return "statistics of the original network; --calibrate FOLDER re-estimates them"
    if calibration.layers == 0:
        return "the original's statistics, which come closer to it than re-estimated ones"
    layers = plural(calibration.layers, "layer")
    return f"statistics of {layers} re-estimated on {plural(calibration.images, 'image')}"


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
    steps: tuple[AdaptationStep, ...]
    drift: Drift
    accuracy: Accuracy | None
    measured_on: str
    interrupted: bool
    path: Path
    bytes: int
    python: str

    def show(self) -> Iterator[RenderableType]:
        """Yield the steps, and what else is to be known."""
        yield from show_steps(self.steps)
        yield from show_facts(_describe_reversion(self))

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {
            **asdict(self),
            "source": str(self.source),
            "path": encode_name(self.path),
            "steps": [step.to_json() for step in self.steps],
            "drift": self.drift.to_json(),
        }


def _describe_reversion(reversion: Reversion) -> Iterator[tuple[str, str]]:
    classes = plural(reversion.num_classes, "class")
    yield "network", f"{reversion.architecture}, {classes}, from {printable(reversion.source)}"
    yield "momentum", "none: the plain rule, which has no gains"
    yield "agreement", describe_drift(reversion.drift, reversion.measured_on)
    if reversion.accuracy:
        before, after = reversion.accuracy.original, reversion.accuracy.converted
        yield "top-1", f"with momentum {before:.1%}, plain {after:.1%}"
    yield "written", f"{printable(reversion.path)} ({format_bytes(reversion.bytes)})"
    yield "Python", reversion.python


def tabulate_stages(
    stages: Sequence[Stage], parameters: int, certificate: Certificate | None
) -> Table:
    """Return a row for each stage of a network with so many ``parameters`` in all."""
    caption = (
        "with momentum: the numbers of these blocks, from 0 · γ: in their rule\n"
        "headroom: bits from the largest activation to the end of its grid\n"
        "bits a block: kept for each value, so that backward finds the activations again"
    )
    table = Table("stage", box=None, pad_edge=False, caption=caption, caption_justify="left")
    for title in ("blocks", "with momentum", "parameters", "γ", "headroom", "bits a block"):
        table.add_column(title, justify="right")
    certificates = {stage.name: stage for stage in certificate.stages} if certificate else {}
    for stage in stages:
        momentum = format_spans(stage.momentum) or "none"
        figures = (str(stage.blocks), momentum, f"{stage.parameters:,}", f"{stage.gamma:g}")
        measured = _measured(certificates.get(stage.name))
        table.add_row(Text(printable(stage.name)), *figures, *measured)
    rest = parameters - sum(stage.parameters for stage in stages)
    table.add_row("the rest", "", "", f"{rest:,}")
    table.add_row("all", "", "", f"{parameters:,}")
    return table


def format_spans(numbers: Sequence[int]) -> str:
    """Return ascending numbers with neighbours drawn together.

    >>> format_spans([1, 2, 3, 5])
    '1-3, 5'
    """
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{s[0]}-{s[-1]}" if len(s) > 1 else str(s[0]) for s in spans)


def _measured(stage: StageCertificate | None) -> tuple[str, ...]:
    if stage is None:
        return ()
    return f"{stage.headroom_bits:.1f} bits", f"{stage.remainder_bits:.2g}"


def show_steps(steps: Sequence[AdaptationStep]) -> Iterator[RenderableType]:
    """Yield a table of what every step did, if there are several."""
    if len(steps) < 2:
        return
    table = Table("step", box=None, pad_edge=False)
    for title in ("agreement", "KL in nats", "logits moved by"):
        table.add_column(title, justify="right")
    for step in steps:
        drift = step.drift
        figures = (f"{drift.agreement:.1%}", f"{drift.divergence:.4f}", f"{drift.distance:.1%}")
        table.add_row(_TOLD[step.name], *figures)
    yield table
    yield Text()


def describe_drift(drift: Drift, origin: str) -> str:
    """Return in one line how far the outputs of both networks are apart."""
    low, high = drift.interval
    return (
        f"same top-1 as the original on {drift.agreement:.1%} of {plural(drift.images, 'image')} "
        f"{origin} (95 % interval {low:.1%} to {high:.1%}); KL {drift.divergence:.4f} nats, "
        f"logits moved by {drift.distance:.1%}"
    )


def describe_rounding(share: float | None) -> str:
    """Return in one line what the grid of x costs, or what it is where that was not measured."""
    if share is None:
        return f"not measured; x is kept to 2^-{FINENESS} of the largest activation, or finer"
    return f"outputs within {share:.1e} of those of the same network in double precision"


def show_facts(facts: Iterable[tuple[str, str]]) -> Iterator[RenderableType]:
    """Return a line with its label for each."""
    return (Text(f"{label:<11}{text}") for label, text in facts)

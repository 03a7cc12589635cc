"""What a conversion did."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from momconv.data.folder import plural, printable
from momconv.surgery.conversion import Stage
from momconv.units import format_bytes


@dataclass(frozen=True, slots=True)
class Calibration:
    """The re-estimation of BatchNorm's statistics."""

    images: int
    layers: int
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
        path: The file.
        bytes: Its size.
    """

    architecture: str
    source: str
    gamma: float
    velocity: str
    gain: bool
    stages: tuple[Stage, ...]
    parameters: int
    calibration: Calibration | None
    path: Path
    bytes: int

    @property
    def next_commands(self) -> tuple[str, ...]:
        """What can be done with the file."""
        file = shlex.quote(str(self.path))
        return f"momconv eval {file} --data FOLDER", f"momconv finetune --from {file} --data FOLDER"

    def to_json(self) -> dict[str, Any]:
        """The same as values that JSON knows."""
        path, exact = str(self.path), True if self.gamma else None
        return {
            **asdict(self),
            "path": path,
            "gradients_exact": exact,
            "next_commands": self.next_commands,
        }


def show_conversion(conversion: Conversion) -> Iterator[RenderableType]:
    """A table of the stages, and what else was done."""
    yield _tabulate(conversion)
    yield Text()
    for label, text in _facts(conversion):
        yield Text(f"{label:<11}{text}")


def _tabulate(conversion: Conversion) -> Table:
    table = Table("stage", box=None, pad_edge=False)
    for title in ("blocks", "with momentum", "parameters", "γ"):
        table.add_column(title, justify="right")
    for stage in conversion.stages:
        momentum = format_spans(stage.momentum) or "none"
        figures = (str(stage.blocks), momentum, f"{stage.parameters:,}", f"{stage.gamma:g}")
        table.add_row(Text(stage.name), *figures)
    rest = conversion.parameters - sum(stage.parameters for stage in conversion.stages)
    table.add_row("the rest", "", "", f"{rest:,}", "")
    table.add_row("all", "", "", f"{conversion.parameters:,}", "")
    return table


def format_spans(numbers: Sequence[int]) -> str:
    """Ascending numbers with neighbours drawn together.

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


def _facts(conversion: Conversion) -> Iterator[tuple[str, str]]:
    yield "network", f"{conversion.architecture}, weights {printable(conversion.source)}"
    if conversion.gamma == 0:
        yield "momentum", "none: γ is 0, the plain network"
    else:
        v = "0" if conversion.velocity == "zero" else "f(x[0])"
        gains = "with a gain for each block" if conversion.gain else "without gains"
        yield "momentum", f"γ {conversion.gamma:g}, v[0] = {v}, {gains}"
    yield "BatchNorm", _describe_calibration(conversion.calibration)
    if conversion.gamma:
        yield "gradients", "bit for bit those of ordinary backpropagation (tested on random images)"
    yield "written", f"{printable(conversion.path)} ({format_bytes(conversion.bytes)})"
    yield from zip(("next", ""), conversion.next_commands, strict=True)


def _describe_calibration(calibration: Calibration | None) -> str:
    if calibration is None:
        return "statistics of the original network; --calibrate FOLDER re-estimates them"
    layers = plural(calibration.layers, "layer")
    return f"statistics of {layers} re-estimated on {plural(calibration.images, 'image')}"

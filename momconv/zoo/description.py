"""What a model file must know to rebuild a network and feed it: plain data, checked when read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt
from torch import nn

from momconv.errors import UsageError
from momconv.vocabulary import Interpolation
from momconv.zoo.seen import SeenImages

MOST_PIXELS = 2**12  # bounds what a stranger's file can ask for
Pixels = Annotated[int, Field(gt=0, le=MOST_PIXELS)]
PositiveFloat = Annotated[FiniteFloat, Field(gt=0)]
ValueRange = tuple[FiniteFloat, FiniteFloat]


@dataclass(frozen=True, slots=True)
class ValueRanges:
    """Which values are black and which are white in images whose values are not 8-bit.

    Each is None where the network was trained on no such images.

    Attributes:
        integers: Of 16 and 32 bits.
        floats: Floating-point values.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    integers: ValueRange | None = None
    floats: ValueRange | None = None

    def __post_init__(self) -> None:
        for bounds in (self.integers, self.floats):
            if bounds is not None and bounds[0] >= bounds[1]:
                raise ValueError(f"no range of values: {bounds[0]} to {bounds[1]}")


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the network's input.

    Attributes:
        resolution: Side of the square that the network sees, in pixels.
        resize: Shorter side before the centre crop, in pixels.
        mean: Subtracted from each of red, green and blue in [0, 1].
        std: What each channel is divided by afterwards.
        interpolation: A value of torchvision's ``InterpolationMode``.
        ranges: What is black and white before all that, where values are not 8-bit.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    resolution: Pixels
    resize: Pixels
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    interpolation: Interpolation = "bilinear"
    ranges: ValueRanges = ValueRanges()

    def at(self, resolution: int) -> Preprocessing:
        """Return the same for another ``resolution``, with ``resize`` scaled in proportion."""
        resize = round(self.resize * resolution / self.resolution)
        return replace(self, resolution=resolution, resize=resize)

    def describe(self) -> str:
        """Return what is done to an image whose values are 8-bit, in that order."""
        mean, std = (", ".join(f"{v:g}" for v in values) for values in (self.mean, self.std))
        return (
            f"shorter side to {self.resize} ({self.interpolation}), centre {self.resolution} × "
            f"{self.resolution}, minus ({mean}), over ({std})"
        )


@dataclass(frozen=True, slots=True)
class Description:
    """Which network this is, what goes in, and what the outputs mean.

    Attributes:
        architecture: A name that ``zoo.networks.build`` knows, such as ``resnet50``.
        num_classes: Outputs of the final layer.
        preprocessing: How an image becomes the input.
        classes: The outputs' names in order; ``None`` when unknown.
        source: Where the weights came from: torchvision's name for them, a file name, or ``none``.
        source_sha256: SHA-256 of the file that the weights came from.
        arguments: Of the function that makes a network of the user's own, each as ``KEY=VALUE``.
        seen: The images that it was trained on; ``None`` when unknown.
        assumed: Whether nobody said how images are prepared, so that ``preprocessing`` is a guess.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    architecture: str
    num_classes: PositiveInt
    preprocessing: Preprocessing
    classes: tuple[str, ...] | None = None
    source: str = "none"
    source_sha256: str | None = None
    arguments: tuple[str, ...] = ()
    seen: SeenImages | None = None
    assumed: bool = False

    def __post_init__(self) -> None:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"{len(self.classes)} class names for {self.num_classes} outputs")


def attach(model: nn.Module, description: Description) -> None:
    """Make ``description`` travel with ``model``, through copies too."""
    model.description = description  # type: ignore[assignment]  # a module takes any attribute


def mark_as_seen(model: nn.Module, sha256s: Iterable[str]) -> None:
    """Write down that ``model`` has seen the images whose content has these SHA-256."""
    description = describe(model)
    seen = (description.seen or SeenImages()).add(sha256s)
    attach(model, replace(description, seen=seen))


def find_description(model: nn.Module) -> Description | None:
    """Return the description that travels with ``model``; None without one."""
    description = getattr(model, "description", None)
    return description if isinstance(description, Description) else None


def describe(model: nn.Module) -> Description:
    """Return the description that travels with ``model``.

    Raises:
        UsageError: The model was not made by momconv and has none.
    """
    description = find_description(model)
    if description is None:
        raise UsageError(
            f"this {type(model).__name__} has no description of its architecture and input",
            kind="usage.no_description",
            fix="momconv.zoo.description.attach(model, Description(architecture=…, …))",
        )
    return description

"""How images are prepared for a network: as its user says, as it says itself, or as is usual."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, get_args

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError
from torch import nn

from momconv.errors import UsageError
from momconv.recipe import split_channels
from momconv.vocabulary import Interpolation
from momconv.words import quoted
from momconv.zoo.description import (
    MOST_PIXELS,
    Description,
    Pixels,
    PositiveFloat,
    Preprocessing,
    attach,
    describe,
)

_KEYS = ("resolution", "resize", "crop", "mean", "std", "interpolation")
_KIND = "usage.preprocessing"
_WANTED = {  # of an option, and an example
    "resize": ("a number of pixels", "256"),
    "crop": ("a share, or a number of pixels", "0.875"),
    "mean": ("three numbers, or one for all", "0.485,0.456,0.406"),
    "std": ("three numbers above 0, or one for all", "0.229,0.224,0.225"),
    "interpolation": (f"one of {', '.join(get_args(Interpolation))}", "bicubic"),
}


@dataclass(frozen=True, slots=True)
class Preparation:
    """What somebody says of the preparation of images; the rest stays as it is.

    Attributes:
        resolution: Side of the square that the network sees, in pixels.
        resize: Shorter side before the centre crop, in pixels.
        crop: The centre crop: its side in pixels, or up to 1 as a share of the shorter side.
        mean: Subtracted from red, green and blue in [0, 1].
        std: What each is divided by afterwards.
        interpolation: Of the resizing.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    resolution: Pixels | None = None
    resize: Pixels | None = None
    crop: Annotated[FiniteFloat, Field(gt=0)] | None = None
    mean: tuple[FiniteFloat, FiniteFloat, FiniteFloat] | None = None
    std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    interpolation: Interpolation | None = None

    @property
    def side(self) -> int | None:
        """The side of the images in the network, if that is said.

        Raises:
            UsageError: It is said twice, differently.
        """
        if self.crop is None or self.crop <= 1:
            return self.resolution
        if self.resolution not in (None, self.crop):
            raise UsageError(
                f"a crop of {self.crop:g} pixels, and images of {self.resolution} in the network",
                kind=_KIND,
                fix=f"--resolution {self.crop:g}",
            )
        return int(self.crop)

    @property
    def is_told(self) -> bool:
        """Whether anything but the size is said."""
        return any(getattr(self, name) is not None for name in _KEYS if name != "resolution")

    def write_options(self) -> list[str]:
        """Return the options of the command line that say the same, but for the resolution."""
        words = []
        for name in _KEYS[1:]:
            if (value := getattr(self, name)) is not None:
                parts = value if isinstance(value, tuple) else (value,)
                words += [f"--{name}", ",".join(map(str, parts))]
        return words

    def apply(self, p: Preprocessing) -> Preprocessing:
        """Return ``p`` with what is said.

        Raises:
            UsageError: That contradicts itself.
        """
        if self.side is not None:
            p = p.at(self.side)
        share = self.crop if self.crop is not None and self.crop <= 1 else None
        if self.resize is not None and share is not None:
            raise UsageError("resize and a share to crop are two words for the same", kind=_KIND)
        resize = round(p.resolution / share) if share else self.resize or p.resize
        if resize < p.resolution:
            raise UsageError(
                f"images of {resize} pixels are too small for a crop of {p.resolution}",
                kind=_KIND,
                fix=f"--resize {p.resolution}",
            )
        if resize > MOST_PIXELS:
            raise UsageError(
                f"images of {resize} pixels are larger than the most, {MOST_PIXELS}",
                kind=_KIND,
                fix=f"--resize {p.resolution}"
                if p.resolution < MOST_PIXELS
                else "--resolution 224",
            )
        return replace(
            p,
            resize=resize,
            mean=self.mean or p.mean,
            std=self.std or p.std,
            interpolation=self.interpolation or p.interpolation,
        )

    def correct(self, description: Description) -> Description:
        """Return ``description`` with what is said.

        Raises:
            UsageError: That contradicts itself.
        """
        if self == Preparation():
            return description
        return replace(
            description,
            preprocessing=self.apply(description.preprocessing),
            assumed=description.assumed and not self.is_told,
        )


def parse_preparation(**options: str | None) -> Preparation:
    """Return what the ``options`` of a command line say, by their names without dashes.

    >>> parse_preparation(mean="0.5", crop="0.875", std=None).mean
    (0.5, 0.5, 0.5)

    Raises:
        UsageError: One of them cannot be.
    """
    given = {name: text for name, text in options.items() if text is not None}
    values = {name: split_channels(given[name]) for name in ("mean", "std") if name in given}
    try:
        return TypeAdapter(Preparation).validate_python(given | values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        what, example = _WANTED[name]
        raise UsageError(
            f"--{name}: {quoted(given[name])} cannot be used: it is {what}",
            kind="usage.bad_value",
            fix=f"--{name} {example}",
        ) from None


def prepare_as(model: nn.Module, said: Preparation) -> None:
    """Write down that images are prepared for ``model`` as is ``said``, if anything is."""
    attach(model, said.correct(describe(model)))


def read_own(model: nn.Module, name: str) -> Preparation | None:
    """Return what a network of the user's own says of itself, if it does.

    It does so by an attribute ``preprocessing``, a dictionary of what a :class:`Preparation` has,
    or by timm's ``pretrained_cfg``.

    Raises:
        UsageError: It says what cannot be.
    """
    said = getattr(model, "preprocessing", None)
    if not isinstance(said, Mapping):
        said = _translate(getattr(model, "pretrained_cfg", None))
    if said is None:
        return None
    try:
        return TypeAdapter(Preparation).validate_python(dict(said))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(
            f"{name}, preprocessing: {'.'.join(map(str, first['loc']))}: {first['msg']}\n"
            f"it is a dictionary with some of {', '.join(_KEYS)}",
            kind=_KIND,
            fix='model.preprocessing = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}',
        ) from error


def _translate(said: object) -> dict[str, Any] | None:
    """Return what timm's words mean."""
    if not isinstance(said, Mapping):
        return None
    words = {"crop_pct": "crop", "mean": "mean", "std": "std", "interpolation": "interpolation"}
    known = {ours: said[theirs] for theirs, ours in words.items() if theirs in said}
    return known | ({"resolution": said["input_size"][-1]} if "input_size" in said else {})


def describe_assumption(model: nn.Module) -> str | None:
    """Return a note of how images are prepared for ``model``, if nobody said how."""
    description = describe(model)
    if not description.assumed:
        return None
    source = description.source
    whose = description.architecture if source == "none" else source
    return (
        f"note: {whose} does not say how its images are prepared; assumed: "
        f"{description.preprocessing.describe()}. Otherwise: --mean, --std, --resize, --crop, "
        "--interpolation"
    )

"""Names to networks with random weights: torchvision's residual networks and the CIFAR family.

Which torchvision networks are residual was found out by converting them all; a test repeats that
for each family.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torchvision
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, get_model_weights, list_models

from momconv.errors import UsageError
from momconv.words import quoted
from momconv.zoo.cifar import DEPTHS, cifar_resnet
from momconv.zoo.description import (
    Description,
    Preprocessing,
    attach,
    describe,
    find_description,
)

_HAVE_NO_SHORTCUTS = "each layer sees only the one before, so nothing is added that could be undone"
_CONCATENATE = (
    "its shortcuts concatenate instead of adding, so no layer keeps the shape of its input"
)
# The families of torchvision's networks that have no residual blocks, and why not.
NOT_RESIDUAL = {
    "alexnet": _HAVE_NO_SHORTCUTS,
    "densenet": _CONCATENATE,
    "googlenet": _CONCATENATE,
    "inception": _CONCATENATE,
    "shufflenet": _CONCATENATE,
    "squeezenet": _CONCATENATE,
    "vgg": _HAVE_NO_SHORTCUTS,
}
_OF_ONE_SIZE = ("vit_", "maxvit_")  # families
_CIFAR_PREPROCESSING = Preprocessing(
    resolution=32, resize=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


@cache
def names() -> tuple[str, ...]:
    """Return all networks that momconv converts, each family by depth."""
    found = list_models(module=torchvision.models, exclude=[f"{name}*" for name in NOT_RESIDUAL])
    return tuple(sorted([*DEPTHS, *found], key=_by_depth))


def is_known(name: str) -> bool:
    """Return whether ``name`` is one of ``names()``."""
    return name in names()


def build(name: str, num_classes: int | None = None, resolution: int | None = None) -> nn.Module:
    """Return the network ``name`` with random weights and its description attached.

    Args:
        name: One of ``names()``.
        num_classes: Outputs of the final layer; by default those of the published weights
            (1000 for ImageNet, 10 for CIFAR).
        resolution: For a vision transformer, which is made for images of one size; by default
            that of the published weights.

    Raises:
        UsageError: ``name`` is not a network that momconv converts.
    """
    check_name(name)
    if name in DEPTHS:
        num_classes = num_classes or 10
        model: nn.Module = cifar_resnet(DEPTHS[name], num_classes)
        preprocessing = _CIFAR_PREPROCESSING
    else:
        num_classes = num_classes or 1000
        preprocessing = preprocessing_of(get_model_weights(name).DEFAULT)
        resolution = resolution or preprocessing.resolution
        size = {"image_size": resolution} if name.startswith("vit_") else {}
        model = get_model(name, weights=None, num_classes=num_classes, **size)
        preprocessing = preprocessing.at(resolution) if size else preprocessing
    attach(model, Description(name, num_classes, preprocessing))
    return model


def build_described(description: Description) -> nn.Module:
    """Return the network of a description, with random weights and that description.

    Raises:
        UsageError: Its architecture is not a network that momconv converts.
    """
    resolution = description.preprocessing.resolution
    model = build(description.architecture, description.num_classes, resolution)
    attach(model, description)
    return model


def outline(name: str, num_classes: int | None = None) -> nn.Module:
    """Build the network on the device "meta": shapes without memory, and without values."""
    with without_memory():
        model = build(name, num_classes)
    return model.to("meta")


@contextmanager
def without_memory() -> Iterator[None]:
    """Inside, new parameters are on the device "meta", as the rest of their network should be.

    ``torch.device("meta")`` would also take the values of what an architecture computes by tensors.
    """
    with torch.device("cpu"), _WithoutMemory():
        yield


def check_name(name: str) -> None:
    """Do nothing if ``name`` is one of ``names()``.

    Raises:
        UsageError: It is not; the message names what was probably meant.
    """
    if is_known(name):
        return
    if name in list_models(module=torchvision.models):
        reason = next(NOT_RESIDUAL[family] for family in NOT_RESIDUAL if name.startswith(family))
        raise UsageError(
            f"{name} is not a residual network: {reason}",
            kind="usage.unsupported_model",
            fix="momconv models",
        )
    close = difflib.get_close_matches(name.lower(), names(), n=1)
    hint = f" — did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"unknown model {quoted(name)}{hint}", kind="usage.unknown_model", fix="momconv models"
    )


def check_resolution(model: nn.Module, resolution: int) -> None:
    """Do nothing if ``model`` takes images of ``resolution`` pixels.

    Raises:
        UsageError: It has a position for each patch of images of another size.
    """
    description = find_description(model)
    if description is None:
        return
    own = description.preprocessing.resolution
    if description.architecture.startswith(_OF_ONE_SIZE) and resolution != own:
        raise UsageError(
            f"{description.architecture} is made for images of {own} pixels, not {resolution}",
            kind="usage.resolution",
            fix=f"--resolution {own}",
        )


@cache
def head_name(architecture: str) -> str:
    """Return the final linear layer's name in the network ``architecture``."""
    if architecture in DEPTHS:
        return "linear"
    return find_head(outline(architecture))


def find_head(model: nn.Module) -> str:
    """Return the name of the last linear layer.

    Raises:
        UsageError: There is none.
    """
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    if not linear:
        raise UsageError(
            f"this {type(model).__name__} has no linear layer at its end",
            kind="usage.no_head",
            fix="momconv.convert(model), and train it with your own loop",
        )
    return str(linear[-1])


def count_classes(model: nn.Module) -> int:
    """Return the outputs of the last linear layer.

    Raises:
        UsageError: There is none.
    """
    return int(model.get_submodule(find_head(model)).get_parameter("weight").shape[0])


def replace_head(model: nn.Module, classes: Sequence[str]) -> None:
    """Give ``model`` a new final layer for ``classes``, and say so in its description.

    Raises:
        UsageError: The model has no description, or no final layer.
    """
    description = describe(model)
    name = find_head(model)
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    place = {"device": old.weight.device, "dtype": old.weight.dtype}
    new = nn.Linear(old.in_features, len(classes), old.bias is not None, **place)
    model.set_submodule(name, new)
    attach(model, replace(description, num_classes=len(classes), classes=tuple(classes)))


def preprocessing_of(weights: Any) -> Preprocessing:
    """Return the preprocessing that a member of a torchvision weights enum was evaluated with."""
    preset = weights.transforms()
    return Preprocessing(
        resolution=preset.crop_size[0],
        resize=preset.resize_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


class _WithoutMemory(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = {"device": "meta"} if func is torch.empty else {}
        return func(*args, **{**(kwargs or {}), **place})


def _by_depth(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts the numbers in a name as numbers."""
    return [
        (int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)
    ]

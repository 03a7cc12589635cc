"""Names to networks with random weights: torchvision's residual networks and the CIFAR family."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torchvision
from torch import nn
from torchvision.models import get_model, get_model_weights, list_models

from momconv.errors import UsageError
from momconv.zoo.cifar import DEPTHS, cifar_resnet
from momconv.zoo.description import Description, Preprocessing, attach, describe

_FAMILIES = ["resnet*", "resnext*", "wide_resnet*"]
_CIFAR_PREPROCESSING = Preprocessing(
    resolution=32, resize=32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
)


def names() -> list[str]:
    """All networks that momconv converts, each family by depth."""
    found = list_models(module=torchvision.models, include=_FAMILIES)
    return sorted([*DEPTHS, *found], key=_by_depth)


def build(name: str, num_classes: int | None = None) -> nn.Module:
    """The network ``name`` with random weights and its description attached.

    Args:
        name: One of ``names()``.
        num_classes: Outputs of the final layer; by default those of the published weights
            (1000 for ImageNet, 10 for CIFAR).

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
        model = get_model(name, weights=None, num_classes=num_classes)
        preprocessing = preprocessing_of(get_model_weights(name).DEFAULT)
    attach(model, Description(name, num_classes, preprocessing))
    return model


def check_name(name: str) -> None:
    """Do nothing if ``name`` is one of ``names()``.

    Raises:
        UsageError: It is not; the message names what was probably meant.
    """
    known = names()
    if name in known:
        return
    if name in list_models(module=torchvision.models):
        raise UsageError(
            f"{name} is not a residual network that momconv converts",
            kind="usage.unsupported_model",
            fix=f"name one of {', '.join(known)}",
        )
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f" — did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"unknown model {name!r}{hint}",
        kind="usage.unknown_model",
        fix=f"name one of {', '.join(known)}",
    )


def head_name(architecture: str) -> str:
    """The final linear layer's name in the network ``architecture``."""
    return "linear" if architecture in DEPTHS else "fc"


def replace_head(model: nn.Module, classes: Sequence[str]) -> None:
    """Give ``model`` a new final layer for ``classes``, and say so in its description.

    Raises:
        UsageError: The model has no description.
    """
    description = describe(model)
    name = head_name(description.architecture)
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, len(classes), device=old.weight.device, dtype=old.weight.dtype)
    setattr(model, name, new)
    attach(model, replace(description, num_classes=len(classes), classes=tuple(classes)))


def preprocessing_of(weights: Any) -> Preprocessing:
    """The preprocessing that a member of a torchvision weights enum was evaluated with."""
    preset = weights.transforms()
    return Preprocessing(
        resolution=preset.crop_size[0],
        resize=preset.resize_size[0],
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        interpolation=preset.interpolation.value,
    )


def _by_depth(name: str) -> list[tuple[int, str]]:
    """A key that sorts the numbers in a name as numbers."""
    return [
        (int(part or 0), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)
    ]

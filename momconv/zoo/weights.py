"""Weights by name or from a file, checked before anything is unpickled."""

import http.client
import shlex
import sys
import urllib.error
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model_weights

from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.words import quoted
from momconv.zoo import checkpoints, own
from momconv.zoo.cifar import DEPTHS
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import build, check_name, find_head, preprocessing_of
from momconv.zoo.offline import is_offline
from momconv.zoo.own import is_own

_SUFFIXES = (".pth", ".th", ".pt", ".safetensors")


def load_network(
    name: str,
    weights: str | Path = "DEFAULT",
    arguments: Mapping[str, Any] | None = None,
    *,
    resolution: int = 224,
) -> nn.Module:
    """The network ``name`` with trained weights, as many classes as they have, and a description.

    Args:
        name: One of ``zoo.networks.names()``, or as in momconv.zoo.own: ``model.py:make``.
        weights: A torchvision name (``DEFAULT``, ``IMAGENET1K_V1``,
            ``ResNet50_Weights.IMAGENET1K_V2``), a ``.pth``, ``.th``, ``.pt`` or ``.safetensors``
            file, or ``none`` for random weights. With a function of yours, all but a file leave
            the weights as it makes them.
        arguments: Of that function.
        resolution: Of the images of the network that it makes, in pixels.

    Raises:
        UsageError: No such network, or no such weights for it.
        ModelFileError: The file is missing or damaged, or belongs to another network.
        ResourceError: The weights cannot be downloaded.
    """
    if is_own(name):
        return _load_own(name, weights, arguments, resolution)
    check_name(name)
    if weights == "none":
        return build(name)
    if _is_file_name(weights):
        path = Path(weights)
        return _load(name, path, _recognise(name, path))
    published = _find_published(name, str(weights))
    return _load(name, _fetch(published), published)


def _load_own(
    name: str, weights: str | Path, arguments: Mapping[str, Any] | None, resolution: int
) -> nn.Module:
    """The network that a function of the user's makes, or one of timm's."""
    from_file = _is_file_name(weights)
    pretrained = weights == "DEFAULT"
    model = own.make(name, arguments, resolution=resolution, pretrained=pretrained)
    if not from_file:
        return model
    path = Path(weights)
    _refuse_converted(path)
    state = checkpoints.read_state(path)
    if classes := checkpoints.outputs_in(state, find_head(model)):
        model = own.remake(replace(describe(model), num_classes=classes), model)
    if difference := checkpoints.difference(model, state):
        raise ModelFileError(
            f"{path} does not fit {name}\ntensors {difference}",
            kind="model_file.wrong_architecture",
        )
    checkpoints.fill(model, state)
    digest = checkpoints.sha256(path)
    attach(model, replace(describe(model), source=path.name, source_sha256=digest))
    return model


def _load(name: str, path: Path, published: Any | None) -> nn.Module:
    """The network ``name`` with the tensors in ``path``, known as ``published`` where it is."""
    _refuse_converted(path)
    state = checkpoints.read_state(path)
    resolution = preprocessing_of(published).resolution if published is not None else None
    model = build(name, checkpoints.classes_in(state, name), resolution)
    if difference := checkpoints.difference(model, state):
        raise _does_not_fit(name, path, state, difference)
    checkpoints.fill(model, state)
    description = replace(describe(model), source=path.name, source_sha256=checkpoints.sha256(path))
    if published is not None:
        description = replace(
            description,
            preprocessing=preprocessing_of(published),
            classes=tuple(published.meta["categories"]),
            source=repr(published),
        )
    attach(model, description)
    return model


def _is_file_name(weights: str | Path) -> bool:
    path = Path(weights)
    return path.suffix in _SUFFIXES or len(path.parts) > 1 or path.is_file()


def _refuse_converted(path: Path) -> None:
    if checkpoints.is_converted(path):
        raise ModelFileError(
            f"{path} is already converted",
            kind="model_file.already_converted",
            fix=f"momconv finetune --data FOLDER --from {shlex.quote(str(path))}",
        )


def _does_not_fit(
    name: str, path: Path, state: checkpoints.State, difference: str
) -> ModelFileError:
    guess = checkpoints.recognise(state)
    return ModelFileError(
        f"{path} does not fit {name}"
        + (f": it looks like {guess}" if guess else "")
        + f"\ntensors {difference}",
        kind="model_file.wrong_architecture",
        fix=checkpoints.convert_command(guess, path) if guess else None,
    )


def _find_published(name: str, weights: str) -> Any:
    """The member of torchvision's enum for ``name`` that is called ``weights``."""
    if name in DEPTHS:
        raise UsageError(
            f"there are no published weights {quoted(weights)} for {name}: "
            "weights are a file or none",
            kind="usage.unknown_weights",
            fix="--weights FILE\n--weights none",
        )
    members = get_model_weights(name)
    short = weights.removeprefix(f"{members.__name__}.")
    if short not in members.__members__:
        offers = [f"{m.name} ({_top1(m):.1f} % top-1)" for m in members]
        raise UsageError(
            f"unknown weights {quoted(weights)} for {name}\n"
            f"valid: DEFAULT (= {members.DEFAULT.name}), {', '.join(offers)}, a file, or none",
            kind="usage.unknown_weights",
        )
    return members[short]


def _top1(published: Any) -> float:
    return float(published.meta["_metrics"]["ImageNet-1K"]["acc@1"])


def _recognise(name: str, path: Path) -> Any | None:
    """The published weights that ``path`` is a copy of, by its SHA-256; ``None`` for others."""
    if name in DEPTHS or not path.is_file():
        return None
    digest = checkpoints.sha256(path)
    return next((m for m in get_model_weights(name) if digest.startswith(_prefix(m.url))), None)


def _fetch(published: Any) -> Path:
    """The file of ``published`` in PyTorch's cache, downloaded if need be, verified each time."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(published.url).name
    if not path.exists():
        if is_offline():
            raise _unreachable(published, path, "not asked for, as momconv is --offline")
        try:
            _download(published.url, path)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise _unreachable(published, path, error) from error
    digest = checkpoints.sha256(path)
    expected = _prefix(published.url)
    if not digest.startswith(expected):
        raise ResourceError(
            f"the cached file {path} is damaged\nit has sha256 {digest}, expected {expected}…",
            kind="weights.bad_cache",
            fix=f"rm {shlex.quote(str(path))}",
        )
    return path


def _download(url: str, destination: Path) -> None:
    """Download ``url``; ``destination`` appears once complete, with the hash its name promises."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(
        url, str(destination), _prefix(url), progress=sys.stderr.isatty()
    )


def _prefix(url: str) -> str:
    """The beginning of the SHA-256 that a published file carries in its name."""
    return PurePosixPath(url).stem.rpartition("-")[2]


def _unreachable(published: Any, path: Path, error: Exception | str) -> ResourceError:
    reason: object = error
    if isinstance(error, urllib.error.HTTPError):
        error.close()
    elif isinstance(error, urllib.error.URLError):
        reason = error.reason
    return ResourceError(
        f"cannot download {published!r}\n{published.url}: {reason}\n"
        "it may come from another machine, by the first of these, or be another file of yours",
        kind="weights.unreachable",
        fix=f"curl --create-dirs -o {shlex.quote(str(path))} {published.url}\n--weights FILE",
    )

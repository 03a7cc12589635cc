"""Weights by name or from a file, checked before anything is unpickled."""

import http.client
import shlex
import sys
import urllib.error
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model_weights

from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.exhaustion import is_exhaustion
from momconv.names import encode_name
from momconv.opening import find_model_file, is_special
from momconv.words import quoted
from momconv.zoo import checkpoints, own
from momconv.zoo.cifar import DEPTHS
from momconv.zoo.description import attach, describe
from momconv.zoo.file_kinds import explain_part
from momconv.zoo.matching import find_network, is_in, recognise
from momconv.zoo.networks import (
    build,
    check_name,
    find_head,
    head_name,
    outline,
    preprocessing_of,
)
from momconv.zoo.offline import is_offline, is_refetching
from momconv.zoo.own import is_own

_SUFFIXES = (".pth", ".th", ".pt", ".ckpt", ".bin", ".tar", ".pt2", ".onnx", ".safetensors")


def load_network(
    name: str,
    weights: str | Path = "DEFAULT",
    arguments: Mapping[str, Any] | None = None,
    *,
    resolution: int | None = None,
    new_head: bool = False,
    tell: Callable[[str], None] = lambda _text: None,
) -> nn.Module:
    """Return the network ``name`` with trained weights, their classes and a description.

    Args:
        name: One of ``zoo.networks.names()``, or as in momconv.zoo.own: ``model.py:make``.
        weights: A torchvision name (``DEFAULT``, ``IMAGENET1K_V1``,
            ``ResNet50_Weights.IMAGENET1K_V2``), a file of PyTorch or safetensors, or ``none`` for
            random weights. With a function of yours, all but a file leave the weights as it makes
            them.
        arguments: Of that function.
        resolution: Of the images of the network that it makes, in pixels, unless it says.
        new_head: Whether the head will be replaced, so that a file need not have one.
        tell: Hears what of a file was taken, and under which names, where that is not plain.

    Raises:
        UsageError: No such network, or no such weights for it.
        ModelFileError: The file is missing or damaged, or belongs to another network.
        ResourceError: The weights cannot be downloaded.
    """
    if is_own(name):
        return _load_own(name, weights, arguments, resolution, _Reading(new_head, tell))
    check_name(name)
    if weights == "none":
        return build(name)
    if _is_file_name(weights):
        path = find_model_file(Path(weights))
        return _load(name, path, _recognise(name, path), _Reading(new_head, tell))
    published = _find_published(name, str(weights))
    return _load(name, _fetch(published), published, _Reading(new_head, tell))


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a file is read into a network."""

    new_head: bool
    tell: Callable[[str], None]

    def find(
        self, name: str, path: Path, network: nn.Module, head: str
    ) -> tuple[checkpoints.Tensors, int | None]:
        """Return what ``network`` needs of the file ``path``, and how many classes its head has.

        Without a head there are no classes, and no tensors of a head.

        Raises:
            ModelFileError: The file is damaged, or another network's, or has no head and needs one.
        """
        _refuse_converted(path)
        tensors = checkpoints.read_state(path)
        head = _widen(head, tensors)
        match = find_network(tensors, network, head, path)
        if text := match.describe(path):
            self.tell(text)
        state, classes = match.state, checkpoints.outputs_in(match.state, head)
        own, _ = _split(network.state_dict(), head)
        found, body = _split(state, head)
        if self.new_head and not _is_usable(found, own):
            self.tell(f"note: {path} has no head that fits; the new one begins at random")
            return body, None
        if found.keys() != own.keys() and checkpoints.difference(network, body | own) is None:
            raise _has_no_head(name, path, own)
        return state, classes

    def fill(self, name: str, path: Path, network: nn.Module, state: checkpoints.Tensors) -> None:
        """Give ``network`` what was found, and its own head where none was.

        Raises:
            ModelFileError: It does not fit, or is not finite.
        """
        head = find_head(network)
        if self.new_head and not any(is_in(key, head) for key in state):
            state = _split(network.state_dict(), _widen(head, state))[0] | state
        if difference := checkpoints.difference(network, state):
            raise _does_not_fit(name, path, state, difference)
        checkpoints.require_finite(path, network, state)
        checkpoints.fill(network, state)


def _widen(head: str, tensors: checkpoints.Tensors) -> str:
    """Return the module that ends with the ``head``, where nothing of it is among ``tensors``."""
    around = head.rpartition(".")[0]
    return head if not around or any(f"{around}." in name for name in tensors) else around


def _split(
    state: checkpoints.Tensors, head: str
) -> tuple[checkpoints.Tensors, checkpoints.Tensors]:
    """Return the tensors of the ``head``, and the others."""
    found = {key: value for key, value in state.items() if is_in(key, head)}
    return found, {key: value for key, value in state.items() if key not in found}


def _is_usable(found: checkpoints.Tensors, own: checkpoints.Tensors) -> bool:
    """Return whether the head ``found`` is as the ``own`` one, but for the number of classes."""
    return found.keys() == own.keys() and all(
        value.isfinite().all() and value.shape[1:] == own[key].shape[1:]
        for key, value in found.items()
    )


def _load_own(
    name: str,
    weights: str | Path,
    arguments: Mapping[str, Any] | None,
    resolution: int | None,
    reading: _Reading,
) -> nn.Module:
    """Return the network that a function of the user's makes, or one of timm's."""
    from_file = _is_file_name(weights)
    pretrained = weights == "DEFAULT"
    model = own.make(name, arguments, resolution=resolution, pretrained=pretrained)
    if not from_file:
        return model
    path = find_model_file(Path(weights))
    state, classes = reading.find(name, path, model, find_head(model))
    if classes:
        model = own.remake(replace(describe(model), num_classes=classes), model)
    reading.fill(name, path, model, state)
    digest = checkpoints.sha256(path)
    attach(model, replace(describe(model), source=encode_name(path.name), source_sha256=digest))
    return model


def _load(name: str, path: Path, published: Any | None, reading: _Reading) -> nn.Module:
    """Return the network ``name`` with the tensors in ``path``, which may be ``published``."""
    resolution = preprocessing_of(published).resolution if published is not None else None
    state, classes = reading.find(name, path, outline(name), head_name(name))
    model = build(name, classes, resolution)
    reading.fill(name, path, model, state)
    digest = checkpoints.sha256(path)
    name_, assumed = encode_name(path.name), published is None
    description = replace(describe(model), source=name_, source_sha256=digest, assumed=assumed)
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
    return path.suffix in _SUFFIXES or len(path.parts) > 1 or path.is_file() or is_special(path)


def _refuse_converted(path: Path) -> None:
    if checkpoints.is_converted(path):
        name = shlex.quote(str(path))
        raise ModelFileError(
            f"{path} is a whole model that momconv wrote, already converted or plain",
            kind="model_file.already_converted",
            fix=f"momconv finetune --data FOLDER --from {name}\nmomconv convert --back {name}",
        )


def _does_not_fit(
    name: str, path: Path, state: checkpoints.Tensors, difference: str
) -> ModelFileError:
    guess, part = recognise(state), explain_part(path)
    looks = f"looks like {guess}" if guess else ""
    reason, fix = part or (looks, checkpoints.convert_command(guess, path) if guess else None)
    return ModelFileError(
        f"{path} does not fit {name}"
        + (f": it {reason}" if reason else "")
        + f"\ntensors {difference}",
        kind="model_file.wrong_architecture",
        fix=fix,
    )


def _has_no_head(name: str, path: Path, head: Iterable[str]) -> ModelFileError:
    option = "--network" if is_own(name) else "--model"
    words = ["momconv", "finetune", option, name, "--weights", str(path), "--data", "FOLDER"]
    return ModelFileError(
        f"{path} has no head of {name}: {', '.join(head)} missing\n"
        "without one it names no classes; fine-tuning gives it a new one for yours",
        kind="model_file.no_head",
        fix=shlex.join(words),
    )


def _find_published(name: str, weights: str) -> Any:
    """Return the member of torchvision's enum for ``name`` that is called ``weights``."""
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
    """Return the published weights that ``path`` is a copy of by its SHA-256, if any."""
    if name in DEPTHS or not path.is_file():
        return None
    digest = checkpoints.sha256(path)
    return next((m for m in get_model_weights(name) if digest.startswith(_prefix(m.url))), None)


def _fetch(published: Any) -> Path:
    """Return the file of ``published`` in PyTorch's cache, downloaded if need be, and verified."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(published.url).name
    expected = _prefix(published.url)
    again = path.exists() and is_refetching() and not is_offline()
    if again and not checkpoints.sha256(path).startswith(expected):
        path.unlink()
    if not path.exists():
        _obtain(published, path)
    digest = checkpoints.sha256(path)
    if not digest.startswith(expected):
        raise ResourceError(
            f"the cached file {path} is damaged\nit has sha256 {digest}, expected {expected}…",
            kind="weights.bad_cache",
            fix=f"--refetch\nrm {shlex.quote(str(path))}",
        )
    return path


def _obtain(published: Any, path: Path) -> None:
    if is_offline():
        raise _unreachable(published, path, "not asked for, as momconv is --offline")
    try:
        _download(published.url, path)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        if is_exhaustion(error):
            raise
        raise _unreachable(published, path, error) from error


def _download(url: str, destination: Path) -> None:
    """Download ``url``; ``destination`` appears once complete, with the hash its name promises."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    torch.hub.download_url_to_file(
        url, str(destination), _prefix(url), progress=sys.stderr.isatty()
    )


def _prefix(url: str) -> str:
    """Return the beginning of the SHA-256 that a published file carries in its name."""
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

"""Networks that are not momconv's: a function of the user's that makes one, or timm's by name.

``path/to/model.py:make`` and ``package.module:make`` name a function without required arguments, or
with those that are given; ``timm:NAME`` one of timm's networks. A file that holds such a network
records the name and the arguments, but the function is only called when the user names it again.
"""

import importlib
import importlib.util
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from torch import nn

from momconv.errors import ResourceError, UsageError
from momconv.vocabulary import Interpolation
from momconv.words import quoted
from momconv.zoo.description import Description, Preprocessing, attach
from momconv.zoo.networks import build_described, count_classes, replace_head
from momconv.zoo.offline import is_offline
from momconv.zoo.preparation import read_own

RESOLUTION = 224  # pixels, of networks that do not know theirs
_TIMM = "timm:"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's


def is_own(name: str) -> bool:
    """Return whether ``name`` is of one of the forms above, and not a network of momconv's."""
    return ":" in name


def is_timm(name: str) -> bool:
    """Return whether ``name`` is one of timm's networks."""
    return name.startswith(_TIMM)


def file_stem(name: str) -> str:
    """Return what a file of the network ``name`` may be called.

    >>> file_stem("path/to/model.py:make"), file_stem("resnet50")
    ('model-make', 'resnet50')
    """
    return Path(name).name.replace(".py:", "-").replace(":", "-")


def make(
    name: str,
    arguments: Mapping[str, Any] | None = None,
    *,
    resolution: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Return the network that ``name`` says, with a description.

    Args:
        name: Such as ``model.py:make`` or ``timm:resnet26``.
        arguments: Of the function.
        resolution: Side of its images in pixels, unless as the network says, or 224; timm's know
            theirs.
        pretrained: Whether a network of timm's gets its published weights.

    Raises:
        UsageError: There is no such function, it wants other arguments, or makes no network.
        ResourceError: timm's weights cannot be downloaded.
    """
    if is_timm(name):
        return _make_timm(name, dict(arguments or {}), pretrained=pretrained)
    function = _find(name)
    try:
        inspect.signature(function).bind(**(arguments or {}))
    except TypeError as error:
        raise UsageError(
            f"{name} cannot be called so: {error}",
            kind="usage.factory_arguments",
            fix="--arg NAME=VALUE for each argument without a default",
        ) from error
    model = function(**(arguments or {}))
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{name} makes a {type(model).__name__}, not a torch.nn.Module", kind="usage.factory"
        )
    said, usual = read_own(model, name), Preprocessing(RESOLUTION, RESOLUTION, _MEAN, _STD)
    preprocessing = said.apply(usual) if said else usual
    preprocessing = preprocessing.at(resolution or preprocessing.resolution)
    _describe(model, name, arguments, preprocessing, assumed=said is None)
    return model


def remake(description: Description, network: nn.Module | None) -> nn.Module:
    """Return the network of a description, with it; the user's own is ``network`` itself.

    Raises:
        UsageError: There is no ``network``, and no such network is known.
    """
    if network is None:
        return build_described(description)
    attach(network, description)
    if count_classes(network) != description.num_classes:
        replace_head(network, description.classes or [""] * description.num_classes)
        attach(network, description)
    return network


def require_made(path: Path, description: Description, network: nn.Module | None) -> None:
    """Do nothing if ``network`` is there, or not needed to know what the file ``path`` describes.

    Raises:
        UsageError: It is needed: nothing in a file is ever run.
    """
    if network is None and is_own(description.architecture):
        raise UsageError(
            f"{path} holds a network of your own, made by {description.architecture}\n"
            "momconv runs no code because of what a file says: name the function again",
            kind="usage.own_network",
            fix=restate(description),
        )


def parse_arguments(texts: Iterable[str]) -> dict[str, Any]:
    """Return the values of ``KEY=VALUE``, as in YAML.

    >>> parse_arguments(["depth=3", "widths=[8, 16]", "norm=batch"])
    {'depth': 3, 'widths': [8, 16], 'norm': 'batch'}

    Raises:
        UsageError: One is not of that form.
    """
    pairs = [(text, *text.partition("=")) for text in texts]
    for text, key, sign, _ in pairs:
        if not sign or not key.isidentifier():
            raise UsageError(
                f"--arg {text}: not of the form KEY=VALUE",
                kind="usage.bad_value",
                fix="--arg depth=3",
            )
    try:
        return {key: yaml.safe_load(value) for _, key, _, value in pairs}
    except yaml.YAMLError as error:
        raise UsageError(f"--arg: not YAML: {error}", kind="usage.bad_value") from error


def write_arguments(arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the inverse of :func:`parse_arguments`, for the values that JSON knows."""
    return tuple(f"{key}={json.dumps(value, default=str)}" for key, value in arguments.items())


def restate(description: Description) -> str:
    """Return the options that make the user's own network of a description again."""
    words = ["--network", description.architecture]
    return shlex.join([*words, *write_options(description.arguments)])


def write_options(arguments: Sequence[str]) -> list[str]:
    """Return the options of the command line that give these ``arguments``."""
    return [word for argument in arguments for word in ("--arg", argument)]


def _describe(
    model: nn.Module,
    name: str,
    arguments: Mapping[str, Any] | None,
    preprocessing: Preprocessing,
    *,
    assumed: bool = False,
) -> None:
    written, classes = write_arguments(arguments or {}), count_classes(model)
    attach(model, Description(name, classes, preprocessing, arguments=written, assumed=assumed))


def _find(name: str) -> Callable[..., Any]:
    place, _, attribute = name.rpartition(":")
    with _from_here():
        module = _run_file(Path(place)) if place.endswith(".py") else _import(place)
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if function is None or not callable(function):
        known = [n for n, value in vars(module).items() if inspect.isfunction(value)]
        raise UsageError(
            f"{place} has no function {quoted(attribute)}",
            kind="usage.factory",
            fix=f"{place}:{known[0]}" if known else f"def {attribute}(): return your network",
        )
    return function


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        problem = "not a regular file" if path.exists() else "file does not exist"
        raise UsageError(
            f"{problem}: {path}", kind="usage.factory", fix="path/to/model.py:function"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import(name: str) -> ModuleType:
    if not name or importlib.util.find_spec(name.partition(".")[0]) is None:
        raise UsageError(
            f"there is no module {quoted(name)}",
            kind="usage.factory",
            fix="path/to/model.py:function",
        )
    return importlib.import_module(name)


@contextmanager
def _from_here() -> Iterator[None]:
    """Inside, modules in the working directory can be imported, as with ``python -m``."""
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path.pop(0)


def _make_timm(name: str, arguments: dict[str, Any], *, pretrained: bool) -> nn.Module:
    if importlib.util.find_spec("timm") is None:
        raise UsageError(
            f"{name} is one of timm's networks, and timm is not installed",
            kind="usage.no_timm",
            fix="pip install timm",
        )
    if is_offline():
        os.environ["HF_HUB_OFFLINE"] = "1"  # which is read when timm is imported
    import timm

    plain = name.removeprefix(_TIMM)
    if not timm.is_model(plain):  # which excludes addresses of the Hugging Face hub
        raise UsageError(
            f"timm has no network {quoted(plain)}",
            kind="usage.unknown_model",
            fix="timm.list_models()",
        )
    try:
        model: nn.Module = timm.create_model(plain, pretrained=pretrained, **arguments)
    except OSError as error:
        raise ResourceError(
            f"cannot download timm's weights for {plain}\n{' '.join(str(error).split())}",
            kind="weights.unreachable",
            fix="--weights FILE\n--weights none",
        ) from error
    data = timm.data.resolve_model_data_config(model)
    side = data["input_size"][-1]
    resize = round(side / data["crop_pct"])
    how: Interpolation = "bicubic" if data["interpolation"] == "bicubic" else "bilinear"
    preprocessing = Preprocessing(side, resize, tuple(data["mean"]), tuple(data["std"]), how)
    _describe(model, name, arguments, preprocessing)
    return model

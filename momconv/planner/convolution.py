"""What a convolution's CPU kernels allocate for themselves, measured on a few images.

Which algorithm oneDNN takes, and with it what that copies, depends on shape, layout, type, threads
and processor, and is its private business. So each distinct convolution runs once with few images
and once with some more, and the course of its allocations is extrapolated to the images of a step.
What was measured is kept for the next time, by processor, threads and version of PyTorch.
"""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from momconv.errors import ResourceError
from momconv.files.atomic import write_text
from momconv.files.cache import cache_folder
from momconv.planner.devices import name_processor
from momconv.planner.measurement import record
from momconv.planner.micro_batch import Curve

aten = torch.ops.aten
Course = list[int]  # bytes alive after each allocation and release
# With so many arguments that have an image in each row, which come first.
CONVOLUTIONS = {aten.convolution.default: 1, aten.convolution_backward.default: 2}
_FEW, _ENOUGH = 2, 16  # images; with so many PyTorch leaves the most to oneDNN
_CPU = torch.device("cpu")


def peak_of_convolution(func: OpOverload, args: Sequence[Any], _results: object = None) -> int:
    """Return the most bytes that ``func(*args)`` adds to the live memory, its results included."""
    images = len(args[0])
    few, many = _choose_images(func, args)
    if images <= many:
        return max(_measure(func, args, images))
    courses = [(count, _measure(func, args, count)) for count in (few, many)]
    return Curve.through(*courses).at(images)


def _choose_images(func: OpOverload, args: Sequence[Any]) -> tuple[int, int]:
    """Return how many images show what more of them take: there is one for each thread.

    With few images PyTorch may choose kernels of its own instead of oneDNN's.
    """
    images, few = len(args[0]), max(_FEW, torch.get_num_threads())
    with _disable_current_modes():
        if images > few and _find_backend(func, args, few) != _find_backend(func, args, images):
            few = max(_ENOUGH, few)
    return few, few + 1 if few in (_FEW, _ENOUGH) else 2 * few


def _find_backend(func: OpOverload, args: Sequence[Any], images: int) -> object:
    batched = CONVOLUTIONS[func]
    x, weight, _bias, *rest = args[batched - 1 :]
    return torch._C._select_conv_backend(x[:images], weight, None, *rest[:6])


def _measure(func: OpOverload, args: Sequence[Any], images: int) -> Course:
    """Return the course of ``func`` with so many images."""
    key, file = _describe(func, args, images), _file()
    known = _recall(file)
    if key not in known:
        known[key] = _run(func, args, images)
        _remember(file, known)
    return known[key]


def _run(func: OpOverload, args: Sequence[Any], images: int) -> Course:
    batched = CONVOLUTIONS[func]
    with _disable_current_modes(), torch.no_grad():
        real = tree_map_only(Tensor, _make, list(args))
        for index in range(batched):
            real[index] = _make(args[index], images)
        results: list[object] = []  # they live until the end
        changes = record(lambda: results.append(func(*real)), _CPU)
    return [*accumulate(changes, initial=0)]


def _make(like: Tensor, images: int | None = None) -> Tensor:
    """Return a tensor of any values in the layout of ``like``."""
    shape = [*like.shape] if images is None else [images, *like.shape[1:]]
    reach = sum((size - 1) * step for size, step in zip(shape, like.stride(), strict=True))
    values = torch.empty(reach + 1, dtype=like.dtype, device=_CPU)
    return values.as_strided(shape, like.stride())


def _describe(func: OpOverload, args: Sequence[Any], images: int) -> str:
    batched = CONVOLUTIONS[func]
    plain = tree_map_only(
        Tensor, lambda t: f"{t.dtype} {[*t.shape]} {[*t.stride()]}", list(args[batched:])
    )
    tensors = [f"{t.dtype} {[*t.shape[1:]]} {[*t.stride()]}" for t in args[:batched]]
    return f"{func} {images} {tensors} {plain}"


# What is kept


def _file() -> Path:
    name = f"{name_processor()}-{torch.get_num_threads()}-threads-torch-{torch.__version__}"
    return cache_folder() / "convolutions" / f"{name}.json"


@cache
def _recall(file: Path) -> dict[str, Course]:
    """Return what is kept in ``file``; nothing if that is missing or damaged."""
    try:
        return TypeAdapter(dict[str, Course]).validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return {}


def _remember(file: Path, courses: Mapping[str, Course]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(courses))
    except (OSError, ResourceError):
        return  # then it is measured again

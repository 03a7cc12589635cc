"""Reading the tensors of a file without running anything that is in it.

A safetensors file is eight bytes with the length of a JSON header, that header, and the tensors.
Everything else is taken for a PyTorch checkpoint and read with ``weights_only=True``.
"""

import difflib
import hashlib
import os
import pickle
import re
import shlex
import struct
import warnings
import zipfile
from collections import OrderedDict
from io import BufferedReader
from pathlib import Path
from typing import TypeGuard

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import get_model_weights

from momconv.errors import ModelFileError
from momconv.zoo.cifar import DEPTHS
from momconv.zoo.networks import head_name, names, outline

State = dict[str, Tensor]

_LARGEST_HEADER = 100_000_000  # bytes, as for the safetensors library itself
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # DistributedDataParallel, torch.compile

_MATRIX = 2  # dimensions
_BUFFERS = 0.05  # of a network's numbers, at most: statistics, and indices of positions

# What torch.load raises on damaged bytes, beside UnpicklingError.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


class _Entry(BaseModel):
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Header(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]

    metadata: dict[str, str] = Field(alias="__metadata__", default_factory=dict)


def read_state(path: Path) -> State:
    """The tensors in ``path`` by name, without the wrappers that training scripts put around.

    Raises:
        ModelFileError: The file is missing or damaged, or holds something else.
    """
    if is_safetensors(path):
        read_metadata(path)  # explains a truncated file
        return _read_safetensors(path)
    content = _unwrap(_read_checkpoint(path))
    state = {str(key): value for key, value in content.items() if _is_dense(value)}
    if not state or len(state) < len(content):
        raise ModelFileError(
            f"{path} holds no state dict\nexpected a dictionary of tensors, or one under "
            "'state_dict' or 'model'",
            kind="model_file.no_state_dict",
        )
    return {_WRAPPERS.sub("", key): value for key, value in state.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of the safetensors file ``path``, which is checked for completeness.

    Raises:
        ModelFileError: The file is truncated or its header is damaged.
    """
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        # Never more than the file has: the length itself may be damaged.
        text = file.read(min(header_size, size, _LARGEST_HEADER))
    if _LARGEST_HEADER < header_size < size:
        raise _damaged(path, f"its header: {header_size:,} bytes, at most {_LARGEST_HEADER:,}")
    promised = 8 + header_size
    if promised <= size:
        header = _parse_header(text, path)
        ends = [entry.data_offsets[1] for entry in header.__pydantic_extra__.values()]
        promised += max(ends, default=0)
    if promised > size:
        raise ModelFileError(
            f"{path} is truncated: header promises {promised:,} bytes, file has {size:,}",
            kind="model_file.truncated",
            fix="copy or download it again",
        )
    return header.metadata


def is_safetensors(path: Path) -> bool:
    """Whether ``path`` begins as a safetensors file does.

    Raises:
        ModelFileError: There is no such file, or it cannot be read.
    """
    with _open(path) as file:
        return file.read(9)[8:] == b"{"


def is_converted(path: Path) -> bool:
    """Whether ``path`` is a file that momconv wrote.

    Raises:
        ModelFileError: It is missing or damaged.
    """
    return is_safetensors(path) and "momconv.schema" in read_metadata(path)


def sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal.

    Raises:
        ModelFileError: There is no such file, or it cannot be read.
    """
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(network: nn.Module, state: State) -> str | None:
    """How ``state`` differs from what ``network`` needs, in one line; ``None`` if it fits."""
    expected = network.state_dict()
    # Checkpoints older than PyTorch 0.4.1 lack the counters, which load_state_dict then sets to 0.
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in expected]
    misshapen = [
        f"{key} {_shape(state[key])} instead of {_shape(expected[key])}"
        for key in expected
        if key in state and state[key].shape != expected[key].shape
    ]
    complex_ = [key for key in expected if key in state and state[key].is_complex()]
    found = [
        ("missing", missing),
        ("unexpected", unexpected),
        ("of another shape", misshapen),
        ("complex", complex_),
    ]
    return "; ".join(f"{len(keys)} {what}: {_first(keys)}" for what, keys in found if keys) or None


def fill(network: nn.Module, state: State) -> None:
    """Give ``network`` the values in ``state``, which fits it."""
    network.load_state_dict(with_version(network, state))


def with_version(network: nn.Module, state: State) -> State:
    """``state`` with the version of the class of ``network``, which torchvision's MNASNet wants.

    Not those of its layers: BatchNorm would miss the counters that old checkpoints lack.
    """
    values = OrderedDict(state)
    values._metadata = {"": {"version": network._version}}  # type: ignore[attr-defined]
    return values


def recognise(state: State) -> str | None:
    """The network in ``names()`` that ``state`` fits, if any."""
    for name in names():
        num_classes = classes_in(state, name) if _has_the_size_of(name, state) else None
        if num_classes and difference(outline(name, num_classes), state) is None:
            return name
    return None


def _has_the_size_of(name: str, state: State) -> bool:
    """Whether as much is learnt as in ``name``, about: cheaper to see than what has which shape."""
    matrices = [value for value in state.values() if value.dim() == _MATRIX]
    if name in DEPTHS or not matrices:
        return name in DEPTHS and f"{head_name(name)}.weight" in state
    classes, features = matrices[-1].shape
    published = get_model_weights(name).DEFAULT.meta
    expected = published["num_params"] - features * len(published["categories"])
    body = sum(map(Tensor.numel, state.values())) - features * classes
    return bool(abs(body / expected - 1) < _BUFFERS)


def classes_in(state: State, architecture: str) -> int | None:
    """How many classes the final layer in ``state`` has; ``None`` without such a layer."""
    return outputs_in(state, head_name(architecture))


def outputs_in(state: State, layer: str) -> int | None:
    """How many outputs the linear ``layer`` has in ``state``; ``None`` without such a layer."""
    weight = state.get(f"{layer}.weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 and len(weight) else None


def convert_command(architecture: str | None, path: Path) -> str:
    """The command that converts ``path``."""
    return f"momconv convert {architecture or 'MODEL'} --weights {shlex.quote(str(path))}"


def _open(path: Path) -> BufferedReader:
    if not path.is_file():
        raise _missing(path)
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelFileError(
            f"cannot read {path}: {error.strerror}", kind="model_file.unreadable"
        ) from error


def _read_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


def _read_checkpoint(path: Path) -> object:
    # Warnings are about pickle protocols, just before it fails. An open file instead of its path
    # keeps torch.load from going by the suffix.
    try:
        with _open(path) as file, warnings.catch_warnings(action="ignore"):
            _refuse_compressed(file, path)
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelFileError(
            f"{path} is no plain checkpoint: it is damaged, or holds Python objects beside tensors"
            "\nmomconv runs no code from a file, so it does not open this one; where it was made, "
            "this writes a plain one",
            kind="model_file.unsafe",
            fix="torch.save(model.state_dict(), 'weights.pth')",
        ) from error
    except _DAMAGE as error:
        explains = isinstance(error, OSError | RuntimeError)  # the others come from wrong bytes
        reason = str(error).partition("\n")[0] if explains else "its bytes are no checkpoint"
        raise _damaged(path, reason) from error


def _refuse_compressed(file: BufferedReader, path: Path) -> None:
    """torch.save stores without compression; a little that is unpacked could fill the memory."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, *_DAMAGE):
        unpacked = 0  # of PyTorch's older format, or damaged, which torch.load finds out
    if unpacked > os.fstat(file.fileno()).st_size:
        raise _damaged(path, f"it unpacks to {unpacked:,} bytes, more than it has")
    file.seek(0)


def _is_dense(value: object) -> TypeGuard[Tensor]:
    """Whether ``value`` is a tensor with memory for each of its numbers.

    Others may claim any shape in a few bytes: sparse ones, those on no device, and expanded ones.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    needed = value.numel() * value.element_size()
    return value.device.type == "cpu" and value.untyped_storage().nbytes() >= needed


def _unwrap(content: object) -> dict[object, object]:
    for key in ("state_dict", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return content if isinstance(content, dict) else {}


def _parse_header(text: bytes, path: Path) -> _Header:
    try:
        return _Header.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(path, f"its header: {error.errors()[0]['msg']}") from error


def _damaged(path: Path, reason: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is damaged, or no model file at all\n{reason}",
        kind="model_file.damaged",
        fix="copy or download it again",
    )


def _missing(path: Path) -> ModelFileError:
    if path.is_dir():
        return ModelFileError(
            f"{path} is a folder, and not a file in it",
            kind="model_file.is_folder",
        )
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return ModelFileError(
        f"file does not exist: {path}",
        kind="model_file.missing",
        fix=f"closest existing file is {path.parent / close[0]}" if close else None,
    )


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", …" if len(keys) > count else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"

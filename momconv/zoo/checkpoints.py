"""Reading the tensors of a file without running anything that is in it.

A safetensors file is eight bytes with the length of a JSON header, that header, and the tensors.
What is no other kind of file either is taken for a PyTorch checkpoint.
"""

import hashlib
import os
import pickle
import re
import shlex
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import TypeGuard

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from momconv.errors import ModelFileError, UncheckedFile
from momconv.exhaustion import require_memory
from momconv.names import encode_name
from momconv.opening import BEST, open_regular
from momconv.words import find_like, name_some, plural, printable
from momconv.zoo import checksum, unpickling
from momconv.zoo.file_kinds import describe_folder, refuse_other_kinds
from momconv.zoo.networks import head_name

Tensors = dict[str, Tensor]

_OF_OPTIMIZER = re.compile(r"^optim|(^|/)state/[0-9]+/")  # how they name what they keep

_LARGEST_HEADER = 100_000_000  # bytes, as for the safetensors library itself


class _Entry(BaseModel):
    data_offsets: tuple[NonNegativeInt, NonNegativeInt]


class _Header(BaseModel):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, _Entry]

    metadata: dict[str, str] = Field(alias="__metadata__", default_factory=dict)


def read_state(path: Path) -> Tensors:
    """Return the tensors in ``path`` by name; in front of those in dictionaries is ``key/``.

    Raises:
        ModelFileError: The file is missing or damaged, or holds something else.
    """
    _open(path).close()
    refuse_other_kinds(path)
    if is_safetensors(path):
        return _read_safetensors(path)
    content = _read_checkpoint(path)
    if isinstance(content, Tensor):
        raise ModelFileError(f"{path} holds one tensor", kind="model_file.no_state_dict")
    state, modules = _flatten(content)
    if all(map(_OF_OPTIMIZER.search, state)):
        state = {}
    if modules and not state:
        raise _holds_code(path, f"a whole pickled network ({modules[0]})", "whole_module")
    if not state:
        raise ModelFileError(
            f"{path} holds no state dict\nexpected a dictionary of tensors, or one inside another",
            kind="model_file.no_state_dict",
            fix="torch.save(model.state_dict(), 'weights.pth') where it was made",
        )
    return state


def read_metadata(path: Path) -> dict[str, str]:
    """Return the metadata of the safetensors file ``path``, which is checked for completeness.

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
    """Return whether ``path`` begins as a safetensors file does.

    Raises:
        ModelFileError: There is no such file, or it cannot be read.
    """
    with _open(path) as file:
        head = file.read(9)
    is_text = head.isascii() and b"\0" not in head
    return head[8:] == b"{" and not is_text


def is_converted(path: Path) -> bool:
    """Return whether ``path`` is a file that momconv wrote.

    Raises:
        ModelFileError: It is missing or damaged.
    """
    return is_safetensors(path) and "momconv.schema" in read_metadata(path)


def verify(path: Path) -> None:
    """Do nothing if the safetensors file ``path`` is as momconv wrote it, or another program.

    Raises:
        ModelFileError: It is missing or damaged, perhaps by a single bit.
    """
    metadata = read_metadata(path)
    if checksum.KEY not in metadata:
        if misspelt := checksum.find_misspelt(metadata):
            raise _damaged(path, f"its checksum is called {printable(misspelt)}")
        if any(key.startswith("momconv.") for key in metadata):
            _warn_of_no_checksum(path)
        return
    try:
        with _named_in_utf8(path) as name, safe_open(name, "pt") as file:
            found = checksum.compute(metadata, file.keys(), file.get_tensor)
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error
    if found != metadata[checksum.KEY]:
        raise _damaged(path, "its checksum is another")


def read_unverified(path: Path, prefix: str) -> Tensors:
    """Return the tensors in the safetensors file ``path`` whose names begin so; no others are read.

    They are for who notices damage without the checksum of the whole file.

    Raises:
        ModelFileError: The file is missing, or its header is damaged.
    """
    read_metadata(path)
    try:
        with _named_in_utf8(path) as name, safe_open(name, "pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (no dict)
            return {key: file.get_tensor(key) for key in keys}
    except SafetensorError as error:
        raise _damaged(path, str(error)) from error


@cache
def _warn_of_no_checksum(path: Path) -> None:
    warnings.warn(
        f"{path} is of an earlier momconv and has no checksum, so damage in it may go unnoticed",
        UncheckedFile,
        stacklevel=2,
    )


def sha256(path: Path) -> str:
    """Return the SHA-256 of the file's bytes, in hexadecimal.

    Raises:
        ModelFileError: There is no such file, or it cannot be read.
    """
    with _open(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(network: nn.Module, state: Tensors) -> str | None:
    """Return how ``state`` differs from what ``network`` needs; ``None`` if it fits."""
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


def require_finite(path: Path, network: nn.Module, state: Tensors) -> None:
    """Do nothing if all numbers in ``state``, which fits, are finite, as those of ``network`` are.

    Raises:
        ModelFileError: Some are infinite or not a number, with which nothing can be computed.
    """
    made = find_spoilt(network.state_dict())  # a mask of attention, say
    if spoilt := [name for name in find_spoilt(state) if name not in made]:
        shown = [f"{name} ({_count_spoilt(state[name])})" for name in spoilt]
        raise ModelFileError(
            f"{path} has values that are not finite (NaN or infinite), as after a training that "
            f"diverged\nin {plural(len(spoilt), 'tensor')}: {_first(shown)}",
            kind="model_file.not_finite",
            fix="take a checkpoint from before, or train again with a lower rate",
        )


def find_spoilt(state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors with values that are infinite or not a number."""
    return [name for name, value in state.items() if not value.isfinite().all()]


def _count_spoilt(value: Tensor) -> str:
    return f"{int((~value.isfinite()).sum()):,} of {value.numel():,}"


def fill(network: nn.Module, state: Tensors) -> None:
    """Give ``network`` the values in ``state``, which fits it."""
    network.load_state_dict(with_version(network, state))


def with_version(network: nn.Module, state: Tensors) -> Tensors:
    """Return ``state`` with the version of ``network``'s class, which MNASNet wants.

    Not those of its layers: BatchNorm would miss the counters that old checkpoints lack.
    """
    values = OrderedDict(state)
    values._metadata = {"": {"version": network._version}}  # type: ignore[attr-defined]
    return values


def classes_in(state: Tensors, architecture: str) -> int | None:
    """Return how many classes the final layer in ``state`` has; ``None`` without such a layer."""
    return outputs_in(state, head_name(architecture))


def outputs_in(state: Tensors, layer: str) -> int | None:
    """Return the outputs of the linear ``layer`` in ``state``; ``None`` without such a layer."""
    weight = state.get(f"{layer}.weight")
    return weight.shape[0] if weight is not None and weight.dim() == 2 and len(weight) else None


def convert_command(architecture: str | None, path: Path) -> str:
    """Return the command that converts ``path``."""
    return f"momconv convert {architecture or 'MODEL'} --weights {shlex.quote(str(path))}"


def _open(path: Path) -> BufferedReader:
    try:
        return open_regular(path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        raise _missing(path) from None
    except OSError as error:
        raise ModelFileError(
            f"cannot read {path}: {error.strerror}", kind="model_file.unreadable"
        ) from error


def _read_safetensors(path: Path) -> Tensors:
    verify(path)
    try:
        with _named_in_utf8(path) as name:
            return load_file(name)
    except (MemoryError, SafetensorError) as error:
        require_memory(error, path.stat().st_size)
        raise _damaged(path, str(error)) from error


@contextmanager
def _named_in_utf8(path: Path) -> Iterator[str]:
    """Give a name of the file ``path``, as the safetensors library wants it."""
    name = str(path)
    if encode_name(name) == name:
        yield name
        return
    with _open(path) as file:
        yield f"/dev/fd/{file.fileno()}"


def _read_checkpoint(path: Path) -> object:
    # An open file instead of its path keeps torch.load from going by the suffix.
    try:
        with _open(path) as file:
            _check_archive(file, path)
            return unpickling.load(file)
    except unpickling.RunsCode as error:
        raise ModelFileError(
            f"{path} asks to run {error} when it is read; nothing of it was run",
            kind="model_file.unsafe",
            fix="get the weights from someone you trust, as a .safetensors file",
        ) from error
    except pickle.UnpicklingError as error:
        if "persistent_load of storage" in str(error):  # the older format keeps a class's source
            raise _holds_code(path, "a whole pickled network", "whole_module") from error
        what = "no plain checkpoint, or is damaged"
        raise _holds_code(path, what, "unsafe") from error
    except unpickling.DAMAGE as error:
        require_memory(error, path.stat().st_size)
        reason = error.strerror if isinstance(error, OSError) else None
        raise _damaged(path, reason or "its bytes are no checkpoint") from error


def _check_archive(file: BufferedReader, path: Path) -> None:
    """Do nothing if what torch.save wrote is small and whole, neither of which torch.load checks.

    It stores without compression; a little that is unpacked could fill the memory. Its checksums
    are all 0 if it was told to compute none.
    """
    size, damaged = os.fstat(file.fileno()).st_size, None
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            if unpacked <= size and any(entry.CRC for entry in entries):
                damaged = archive.testzip()
    except unpickling.DAMAGE:
        unpacked = 0  # of PyTorch's older format, or damaged, which torch.load finds out
    if unpacked > size:
        raise _damaged(path, f"it unpacks to {unpacked:,} bytes, more than it has")
    if damaged is not None:
        raise _damaged(path, f"the checksum of {printable(damaged)} in it is another")
    file.seek(0)


def _is_dense(value: object) -> TypeGuard[Tensor]:
    """Return whether ``value`` is a tensor with memory for each of its numbers.

    Others may claim any shape in a few bytes: sparse ones, those on no device, and expanded ones.
    """
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized:
        return False
    needed = value.numel() * value.element_size()
    return value.device.type == "cpu" and value.untyped_storage().nbytes() >= needed


def _flatten(content: object) -> tuple[Tensors, list[str]]:
    """Return the tensors in nested containers, and the classes of whole networks among these.

    Arrays of NumPy are such where there are no others; else they are states of random numbers.
    """
    state, arrays, modules = Tensors(), Tensors(), list[str]()
    todo, seen = [("", content)], set[int]()
    while todo:
        place, value = todo.pop()
        if _is_dense(value):
            state[place.removesuffix("/")] = value
            continue
        if isinstance(value, unpickling.Array) and value.tensor is not None:
            arrays[place.removesuffix("/")] = value.tensor
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        inside = _look_into(value)
        if "_parameters" in inside:
            modules.append(type(value).__qualname__)
            continue
        todo += [(f"{place}{key}/", entry) for key, entry in reversed(inside.items())]
    return state or arrays, modules


def _look_into(value: object) -> dict[object, object]:
    if isinstance(value, unpickling.StandIn):
        return value.contents
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else {}


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


def _holds_code(path: Path, what: str, kind: str) -> ModelFileError:
    return ModelFileError(
        f"{path} is {what}\nmomconv runs no code from a file, so it does not open this one; where "
        "it was made, this writes a plain one",
        kind=f"model_file.{kind}",
        fix="torch.save(model.state_dict(), 'weights.pth')",
    )


def _missing(path: Path) -> ModelFileError:
    if path.is_dir():
        return describe_folder(path)
    like, runs = find_like(path), sorted(file.parent for file in path.parent.glob(f"*/{BEST}"))
    beside = f"\nruns with a model: {name_some(runs)}" if runs and not like else ""
    return ModelFileError(
        f"file does not exist: {path}{beside}",
        kind="model_file.missing",
        fix=f"closest existing file is {like}" if like else None,
    )


def _first(keys: list[str], count: int = 3) -> str:
    return ", ".join(keys[:count]) + (", …" if len(keys) > count else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"

"""Reading a PyTorch checkpoint whatever lies beside its tensors, and running none of it.

torch.load with ``weights_only=True`` makes nothing but tensors and plain containers. Here, each
other class or function that a file names is stood in for by a class of our own, which takes
whatever it is called with and does nothing.
"""

import io
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import torch
from torch.serialization import safe_globals

from momconv.zoo.file_kinds import read_pickle

# What damaged bytes raise, beside UnpicklingError.
DAMAGE = (
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
    zipfile.BadZipFile,
    zlib.error,
)

_BEFORE = 3  # pickles before the content, in the format of PyTorch before 1.6

# What runs code, and has no business in a checkpoint, though it would do nothing here either.
_RUNNERS = {
    *("builtins." + name for name in ("__import__", "compile", "eval", "exec", "open")),
    *("code", "ctypes", "importlib", "nt", "os", "posix", "pty", "runpy", "shutil", "socket"),
    *("subprocess", "sys", "urllib.request", "webbrowser"),
}


class RunsCode(Exception):
    """A file names something that runs code; nothing of it was run."""


class _Like(type):
    """Lets the unpickler put items into stand-ins: it compares with ``dict``, by ``==``."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is dict

    __hash__ = type.__hash__


class StandIn(list[object], metaclass=_Like):
    """In place of an object of a class that is not to be trusted; see ``contents``.

    A list, as only those may be extended.
    """

    contents: dict[object, object]

    def __new__(cls, *_args: object) -> "StandIn":
        """Whatever the arguments: they are dropped. Some are made by this alone."""
        made = super().__new__(cls)
        made.contents = {}
        return made

    def __init__(self, *_args: object) -> None:
        super().__init__()

    def __setstate__(self, state: object) -> None:
        """Keep the attributes, which are looked at and never used."""
        if isinstance(state, dict):
            self._keep(state)

    def __setitem__(self, key: object, value: object) -> None:
        self._keep({key: value})

    def _keep(self, values: dict[object, object]) -> None:
        self.contents.update(values)

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class _Kind(StandIn):
    """In place of a data type of NumPy: its name is kept, and the order of its bytes."""

    def __init__(self, *args: object) -> None:
        super().__init__()
        self.code, self.order = str(args[0]) if args else "", "="

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple):
            self.order = str(state[1]).replace("|", "=")


class Array(StandIn):
    """In place of an array of NumPy, whose numbers are kept as a ``tensor``; None of others."""

    tensor: torch.Tensor | None = None

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple):
            return
        _, shape, kind, by_columns, data = state
        if isinstance(kind, _Kind) and re.fullmatch("[fiu][1248]|b1", kind.code):
            flat = np.frombuffer(data, kind.order + kind.code)
            array = flat.reshape(shape, order="F" if by_columns else "C")
            self.tensor = torch.tensor(array.astype(kind.code))


# By their names in NumPy 1 and 2.
_OF_NUMPY: dict[str, type[StandIn]] = {
    "numpy.dtype": _Kind,
    "numpy.core.multiarray._reconstruct": Array,
    "numpy._core.multiarray._reconstruct": Array,
}


def load(file: BinaryIO) -> object:
    """Return the content of a checkpoint, with a ``StandIn`` for each object of a foreign class.

    Raises:
        RunsCode: It names a function that runs code.
        UnpicklingError: It is damaged, or not to be read without trust.
        Exception: It is damaged: one of ``DAMAGE``.
    """
    names = _list_globals(file)
    if runners := sorted(filter(_runs_code, names)):
        raise RunsCode(runners[0])
    file.seek(0)
    # Warnings are about pickle protocols, just before it fails.
    with warnings.catch_warnings(action="ignore"), safe_globals([*map(_stand_in, names)]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _list_globals(file: BinaryIO) -> set[str]:
    """Return the classes and functions that the checkpoint names."""
    names = set[str]()
    try:
        for opcode, argument, _ in pickletools.genops(_find_pickle(file)):
            if opcode.name == "GLOBAL" and argument:
                names.add(_rename(*argument.split(" ", 1)))
    except (pickle.UnpicklingError, *DAMAGE):
        pass  # damaged, which torch.load finds out
    return names


def _find_pickle(file: BinaryIO) -> BinaryIO:
    """Return where the names are, in either of PyTorch's formats."""
    try:
        with zipfile.ZipFile(file) as archive:
            return io.BytesIO(read_pickle(archive))
    except zipfile.BadZipFile:
        file.seek(0)
        for _ in islice(_pickles(file), _BEFORE):
            pass
        return file


def _pickles(file: BinaryIO) -> Iterator[None]:
    while True:
        for _ in pickletools.genops(file):
            pass
        yield


def _rename(module: str, name: str) -> str:
    """Return what Python 3 calls what Python 2 named so, as the unpickler does."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _runs_code(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:end]) in _RUNNERS for end in range(1, len(parts) + 1))


def _stand_in(name: str) -> tuple[Callable[..., Any], str]:
    module, _, own = name.rpartition(".")
    return type(own, (_OF_NUMPY.get(name, StandIn),), {"__module__": module}), name

import argparse
import collections
import datetime
import enum
import functools
import io
import os
import pathlib
import pickle
import random
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from momconv.zoo import unpickling

WEIGHTS = {"weight": torch.arange(4.0)}


class _Colour(enum.Enum):
    RED = 1


class _Rate:
    def __init__(self) -> None:
        self.factor = 0.5

    def __call__(self, epoch: int) -> float:
        return self.factor**epoch


class _Options(dict[str, object]):
    pass


class _Names(list[str]):
    pass


@dataclass
class _Settings:
    rate: float = 0.1


@dataclass(frozen=True, slots=True)
class _Slots:
    rate: float = 0.1


class _Calls:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def _run() -> None:
    pytest.fail("code from the file was run")


def _save(content: object, *, zipped: bool) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    file.seek(0)
    return file


def _scheduler() -> dict[str, object]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1)
    state = torch.optim.lr_scheduler.LambdaLR(optimizer, _Rate()).state_dict()
    return {"optimizer": optimizer.state_dict(), "scheduler": state}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    "beside",
    [
        argparse.Namespace(lr=0.1, where=pathlib.Path("here"), colour=_Colour.RED),
        collections.defaultdict(list, {"a": [1]}),
        collections.deque([1, 2], 3),
        collections.UserDict({"a": 1}),
        _Options(a=1),
        _Names(["a"]),
        _Settings(),
        _Slots(),
        {_Colour.RED: {1, 2}, "range": range(3)},
        frozenset([1]),
        np.float64(3),
        np.arange(3),
        np.dtype("float32"),
        np.random.default_rng(0),
        datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        functools.partial(int, base=2),
        random.getstate(),
        _scheduler(),
        2**100,
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_beside_the_weights_does_no_harm(beside: object, *, zipped: bool) -> None:
    content = unpickling.load(_save({"beside": beside, "model": WEIGHTS}, zipped=zipped))
    assert isinstance(content, dict)
    assert torch.equal(content["model"]["weight"], WEIGHTS["weight"])


def test_what_objects_contain_can_be_looked_at() -> None:
    options, names = argparse.Namespace(model=WEIGHTS), _Options(a=1)
    content = unpickling.load(_save([options, names, _Slots()], zipped=True))
    assert isinstance(content, list)
    assert all(isinstance(entry, unpickling.StandIn) for entry in content)
    assert torch.equal(content[0].contents["model"]["weight"], WEIGHTS["weight"])
    assert [entry.contents for entry in content[1:]] == [{"a": 1}, {}]
    assert type(content[0]).__qualname__ == "Namespace"


@pytest.mark.parametrize("kind", ["f4", ">f4", "f2", "i8", ">i2", "u1", "?"])
def test_the_numbers_of_an_array_are_read(kind: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(kind)
    for stored in (array, np.asfortranarray(array)):
        content = unpickling.load(_save(stored, zipped=True))
        assert isinstance(content, unpickling.Array)
        assert content.tensor is not None
        assert content.tensor.tolist() == array.tolist()


def test_an_array_of_objects_has_no_numbers() -> None:
    content = unpickling.load(_save(np.array([_Settings(), None]), zipped=True))
    assert isinstance(content, unpickling.Array)
    assert content.tensor is None


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (_Calls(os.system, "exit 1"), "posix.system"),
        (_Calls(eval, "1 / 0"), "builtins.eval"),
        (_Calls(exec, "1 / 0"), "builtins.exec"),
        (_Calls(subprocess.check_output, ["false"]), "subprocess.check_output"),
        (_Calls(getattr, _Calls(__import__, "os"), "abort"), "builtins.__import__"),
        ({"a": [_Calls(functools.partial, os.abort)]}, "posix.abort"),
    ],
    ids=["system", "eval", "exec", "subprocess", "import", "nested"],
)
def test_what_runs_code_is_refused_by_name(call: object, named: str, *, zipped: bool) -> None:
    with pytest.raises(unpickling.RunsCode, match=f"^{named}$"):
        unpickling.load(_save({"model": WEIGHTS, "x": call}, zipped=zipped))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("call", [_Calls(_run), _Calls(_Calls, _run, _Calls(_run))])
def test_no_function_of_a_file_is_called(call: _Calls, *, zipped: bool) -> None:
    content = unpickling.load(_save({"model": WEIGHTS, "x": call}, zipped=zipped))
    assert isinstance(content, dict)
    assert isinstance(content["x"], unpickling.StandIn)
    assert content["x"].contents == {}


def test_what_a_file_makes_is_not_called_either() -> None:
    with pytest.raises(pickle.UnpicklingError, match="unrecognized function"):
        unpickling.load(_save(_Calls(pytest.fail, "run"), zipped=True))  # an object, with __call__


def test_nothing_stays_allowed_afterwards() -> None:
    before = set(torch.serialization.get_safe_globals())  # PyTorch lists a set: in any order
    unpickling.load(_save(argparse.Namespace(), zipped=True))
    assert set(torch.serialization.get_safe_globals()) == before

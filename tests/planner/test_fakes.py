"""That predictions stay right is tested in test_prediction."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from momconv.planner.fakes import Imitator

aten = torch.ops.aten
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momconv.planner.fakes._memories", {})


class Imitating(TorchDispatchMode):
    """Runs all operations by an imitator; which of them it examined is noted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.examined: list[Any] = []
        self.imitator = Imitator(lambda func, *_: self.examined.append(func))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        return self.imitator.run(func, args, kwargs or {}).value

    def twice(self, work: Callable[[], Any]) -> tuple[Any, Any]:
        """What ``work`` returns when it is asked for and when it is remembered."""
        with self.imitator.mode, self:
            first = work()
            self.examined.clear()
            second = work()
        return first, second


def describe(tensor: Tensor) -> tuple[Any, ...]:
    assert isinstance(tensor, FakeTensor)
    place = tensor.fake_device, tensor.dtype, tensor.untyped_storage().nbytes()
    return *place, tensor.shape, tensor.stride(), tensor.storage_offset()


CASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "new": lambda x, y: x @ y,
    "of a common type": lambda x, y: x.half() + y.long(),
    "with a number": lambda x, y: (x * 2, x.long() * 2.0),
    "strided": lambda x, y: (x.t() + 1, x.clone()),
    "two results": lambda x, y: torch.max(x, dim=0),
    "of a list": lambda x, y: torch.stack([x, y]),
    "in place": lambda x, y: x.clone().add_(y),
    "a view": lambda x, y: x[1:, :2],
}
ASKED_AGAIN: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "several views": lambda x, y: x.split(2),
    "a view of a copy": lambda x, y: x.t().reshape(-1),
}


@pytest.mark.parametrize("name", [*CASES, *ASKED_AGAIN])
def test_the_second_answer_is_like_the_first(name: str) -> None:
    mode = Imitating()
    with mode.imitator.mode:
        x, y = torch.empty(4, 4), torch.empty(4, 4)
    first, second = mode.twice(lambda: (CASES | ASKED_AGAIN)[name](x, y))
    assert list(map(describe, tree_leaves(first))) == list(map(describe, tree_leaves(second)))
    assert bool(mode.examined) == (name in ASKED_AGAIN)


def test_what_shares_memory_still_does() -> None:
    mode = Imitating()
    with mode.imitator.mode:
        x = torch.empty(4, 4)
    for view in mode.twice(lambda: x[1:]):
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
    assert all(written is x for written in mode.twice(lambda: x.mul_(2)))
    one, other = mode.twice(lambda: x + 1)
    assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


STRIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "layer norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]),
    "of one tensor": torch.round,
    "of two": lambda x: x + x,
    "in place": lambda x: x.add_(x),
    "a copy": torch.clone,
    "a copy of another type": torch.Tensor.half,
}
WITH_A_NUMBER: dict[str, Callable[[Tensor], Tensor]] = {"with a number": lambda x: x * 2}


@pytest.mark.parametrize(
    ("name", "shape", "stride"),
    [
        *((name, (2, 3, 1, 1), (3, 1, 3, 3)) for name in (*STRIDED, *WITH_A_NUMBER)),
        *((name, (2, 3, 2, 2), (12, 1, 6, 3)) for name in (*STRIDED, *WITH_A_NUMBER)),
        *((name, (1, 3, 2, 2), (3, 1, 6, 3)) for name in STRIDED),  # one image of several
    ],
)
def test_a_result_has_the_strides_of_a_real_one(
    name: str, shape: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    work = (STRIDED | WITH_A_NUMBER)[name]
    mode = Imitating()
    with mode.imitator.mode:
        fake = torch.empty_strided(shape, stride)
    real = work(torch.empty_strided(shape, stride).zero_())
    for imitated in mode.twice(lambda: work(fake)):
        assert imitated.stride() == real.stride()


def test_what_changes_the_shape_of_an_argument_is_not_remembered() -> None:
    mode = Imitating()
    with mode.imitator.mode, mode:
        for _ in range(2):
            x = torch.empty(4, 2)
            x.t_()
            assert x.shape == (2, 4)


def test_numbers_of_one_value_and_two_types_are_told_apart() -> None:
    mode = Imitating()
    with mode.imitator.mode, mode:
        x = torch.empty(2, dtype=torch.long)
        assert [(x * number).dtype for number in (1, 1.0)] == [torch.long, torch.float32]


def test_a_copy_has_the_parameters_and_buffers_but_not_their_memory() -> None:
    layer = nn.BatchNorm1d(3)
    layer.bias.requires_grad_(False)
    copied = Imitator(lambda *_: None).copy(layer, CPU)
    assert isinstance(copied, nn.BatchNorm1d)
    assert [p.requires_grad for p in copied.parameters()] == [True, False]
    assert all(isinstance(t, FakeTensor) for t in (*copied.parameters(), *copied.buffers()))
    assert not isinstance(layer.weight, FakeTensor)

"""Operations on fake tensors, which have shapes, types and lifetimes but no memory.

PyTorch's FakeTensorMode finds out what an operation returns, but takes a tenth of a millisecond
for it, and several where it has not met it before. Networks repeat few operations many times, so
the answers are remembered here.
"""

import copy
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
_T = TypeVar("_T")


_LAYER_NORM = (aten.native_layer_norm.default, aten.native_layer_norm_backward.default)


class Answer(NamedTuple, Generic[_T]):
    """What an operation returned, and what was found out about it."""

    value: Any
    tensors: Sequence[Tensor]
    finding: _T


class _New(NamedTuple):
    """A result with a storage of its own."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


# A result is new, one of the arguments' tensors (by its number), a view of one, or no tensor.
_Kind = _New | int | Literal["view"] | None


@dataclass(frozen=True, slots=True, eq=False)
class _Memory:
    """What an operation returned on certain arguments."""

    kinds: Sequence[_Kind]
    is_single: bool  # rather than a tuple


_memories: dict[Hashable, _Memory] = {}  # of all networks


class _Unknown(Exception):
    """What an operation returns has to be found anew each time."""


class Imitator(Generic[_T]):
    """Runs operations on fake tensors."""

    def __init__(self, examine: Callable[[OpOverload, Any, Sequence[Tensor]], _T]) -> None:
        """``examine`` gets an operation, its arguments and its results, once for all alike."""
        # Not every tensor is a fake: a module may hold one that is no buffer.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._examine = examine
        self._findings: dict[_Memory, _T] = {}

    def copy(
        self, model: nn.Module, device: torch.device, *, is_contiguous: bool = False
    ) -> nn.Module:
        """Return a copy of ``model`` on ``device`` whose parameters and buffers are fakes.

        They lie in memory as those of ``model`` do, unless they are to be contiguous.
        """
        memo: dict[int, Any] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            straight = make_contiguous_strides_for(tensor.shape)
            stride = straight if is_contiguous else tensor.stride()
            fake = self._make(_New(tensor.shape, stride, tensor.dtype, device))
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
        return copy.deepcopy(model, memo)

    def run(self, func: OpOverload, args: Any, kwargs: Any) -> Answer[_T]:
        """Return what ``func(*args, **kwargs)`` returns while ``mode`` is on."""
        try:
            key = _sign_call(func, args, kwargs)
        except _Unknown:
            return self._ask(func, args, kwargs)
        if memory := _memories.get(key):
            return self._repeat(memory, func, args, kwargs)
        answer = self._ask(func, args, kwargs)
        inputs = _find_tensors((args, kwargs))
        results = list(answer.value) if isinstance(answer.value, tuple) else [answer.value]
        try:
            kinds = [_classify(func, result, inputs) for result in results]
            if key == _sign_call(func, args, kwargs):  # no argument has another shape now
                memory = _Memory(kinds, is_single=not isinstance(answer.value, tuple))
                _memories[key], self._findings[memory] = memory, answer.finding
        except _Unknown:
            pass
        return answer

    def _ask(self, func: OpOverload, args: Any, kwargs: Any) -> Answer[_T]:
        value = func(*args, **kwargs)
        if func in _LAYER_NORM or _is_plain(func, args):
            value = tree_map_only(FakeTensor, self._straighten, value)
        tensors = _find_tensors(value)
        return Answer(value, tensors, self._examine(func, args, tensors))

    def _repeat(self, memory: _Memory, func: OpOverload, args: Any, kwargs: Any) -> Answer[_T]:
        results: list[Any] = []
        for kind in memory.kinds:
            if isinstance(kind, _New):
                results.append(self._make(kind))
            elif kind == "view":
                with in_kernel_invocation_manager(self.mode):
                    view = func(*args, **kwargs)
                    results.append(FakeTensor(self.mode, view, args[0].fake_device))
            else:
                results.append(None if kind is None else _find_tensors((args, kwargs))[kind])
        tensors = [result for result in results if result is not None]
        value = results[0] if memory.is_single else tuple(results)
        if memory not in self._findings:
            self._findings[memory] = self._examine(func, args, tensors)
        return Answer(value, tensors, self._findings[memory])

    def _straighten(self, result: FakeTensor) -> FakeTensor:
        """Return a contiguous result whose dimensions of one element have a kernel's strides.

        Fakes have the argument's there, of which convolutions may read another layout.
        """
        stride = make_contiguous_strides_for(result.shape)
        if not result.is_contiguous() or result.stride() == stride:
            return result
        return self._make(_New(result.shape, stride, result.dtype, result.fake_device))

    def _make(self, new: _New) -> FakeTensor:
        with in_kernel_invocation_manager(self.mode):
            empty = torch.empty_strided(new.shape, new.stride, dtype=new.dtype, device="meta")
            return FakeTensor(self.mode, empty, new.device)


def _is_plain(func: OpOverload, args: Any) -> bool:
    """Return whether the kernel of ``func`` goes through contiguous tensors to a new one."""
    if torch.Tag.pointwise not in func.tags or func._schema.is_mutable:
        return False
    if func is aten.clone.default:  # with all strides
        return False
    return all(isinstance(arg, FakeTensor) and arg.shape == args[0].shape for arg in args)


def _sign_call(func: OpOverload, args: Any, kwargs: Any) -> Hashable:
    """Return what the results of ``func(*args, **kwargs)`` can depend on.

    The number of threads is a part of it: some decide between backends, and so between layouts.

    Raises:
        _Unknown: An argument's value counts.
    """
    return torch.get_num_threads(), func, _sign((*args, *kwargs.items()))


def _sign(value: Any) -> Hashable:
    """Return what of an argument the results of an operation can depend on.

    Raises:
        _Unknown: Its value counts.
    """
    kind = type(value)
    if kind is FakeTensor:
        if value.constant is not None:
            raise _Unknown
        place = value.dtype, value.fake_device
        return *place, value.shape, value.stride(), value.storage_offset()
    if isinstance(value, (list, tuple)):
        return tuple(map(_sign, value))
    if isinstance(value, Tensor):
        raise _Unknown
    return kind, value


def _classify(func: OpOverload, result: Any, inputs: Sequence[Tensor]) -> _Kind:
    """Return what kind of result it is.

    Raises:
        _Unknown: None of them.
    """
    if result is None:
        return None
    if type(result) is not FakeTensor or result.constant is not None:
        raise _Unknown
    for number, tensor in enumerate(inputs):
        if tensor is result:
            return number
    if func.is_view and len(inputs) == 1:
        return "view"
    storage = result.untyped_storage()
    is_shared = any(storage._cdata == tensor.untyped_storage()._cdata for tensor in inputs)
    new = _New(result.shape, result.stride(), result.dtype, result.fake_device)
    size = torch.empty_strided(*new[:2], dtype=new.dtype, device="meta").untyped_storage().nbytes()
    if is_shared or size != storage.nbytes():
        raise _Unknown
    return new


def _find_tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]

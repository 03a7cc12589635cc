"""What an operation's CPU kernel allocates for itself and frees before it returns.

Fake tensors show what an operation returns, not this. The rules say how many bytes are alive at
most while an operation runs, its results included, as a function of its arguments. They were read
off PyTorch's allocator, one operation at a time, and hold for PyTorch's CPU kernels. What oneDNN's
convolutions need depends on the processor and is measured (convolution.py). Not known is what
products of matrices and attention copy in bf16 on tiles (AMX), a few MiB at most.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from momconv.planner.convolution import CONVOLUTIONS, peak_of_convolution

aten = torch.ops.aten
_FLOAT = 4  # bytes
Arguments = tuple[Any, ...]
ScratchRule = Callable[[Arguments, Sequence[Tensor]], int]


def peak_within(func: OpOverload, args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the most bytes that ``func(*args)`` adds to the live memory; 0 if unknown."""
    if func in _RULES:
        return _RULES[func](args, results)
    return _casts(args, results) if torch.Tag.pointwise in func.tags else 0


def _casts(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes of arguments of mixed types that are copied to the common type first."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
    if len({tensor.dtype for tensor in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    copies = sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)
    return copies + _bytes(*(r for r in results if all(r is not t for t in tensors)))


def _batch_norm_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes with a second gradient of the input, which is copied into the first."""
    x = args[1]
    return _bytes(*results) + (_bytes(x) if results and results[0].shape == x.shape else 0)


def _layer_norm(args: Arguments, results: Sequence[Tensor]) -> int:
    return _bytes(*results) + _copies(args[0])


def _layer_norm_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes of copies without gaps, and of each thread's gradients."""
    gradient, x, shape = args[:3]
    sums: int = 2 * torch.get_num_threads() * math.prod(shape) * x.element_size()
    return _bytes(*results) + _copies(gradient, x) + sums


def _sum(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes with a copy, in which integers are added as int64."""
    x = args[0]
    copied = not x.dtype.is_floating_point and x.dtype != results[0].dtype
    return _bytes(*results) + (x.numel() * results[0].element_size() if copied else 0)


def _mean(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes with a copy in single precision, in which half precision is averaged."""
    x = args[0]
    copied = x.element_size() < _FLOAT and x.dtype.is_floating_point
    return _bytes(*results) + (_FLOAT * (x.numel() + results[0].numel()) if copied else 0)


# Attention, whose blocks are PyTorch's


def _attention(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes of each thread's block of scores, their maxima and sums, and the output."""
    query, key = args[:2]
    rows, columns = _score_block(query, key)
    scores = rows * columns
    scratch = scores + 2 * rows + rows * query.shape[-1]
    return _bytes(*results) + _per_thread(scratch, scores, query)


def _attention_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    """Return the bytes of each thread's block of scores and of their gradients."""
    gradient, query, key = args[:3]
    rows, columns = _score_block(query, key)
    scratch = 2 * rows * columns
    return _bytes(*results) + _copies(gradient) + _per_thread(scratch, scratch, query)


def _score_block(query: Tensor, key: Tensor) -> tuple[int, int]:
    length = query.shape[-2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[-2])


def _per_thread(floats: int, narrow: int, query: Tensor) -> int:
    """Return the bytes of so many floats a thread, ``narrow`` of them in half precision too."""
    half = query.element_size() if query.element_size() < _FLOAT else 0
    return torch.get_num_threads() * (floats * _FLOAT + narrow * half)


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copies(*tensors: Tensor) -> int:
    """Return the bytes of the copies of those that have gaps or another order in memory."""
    return _bytes(*(tensor for tensor in tensors if not tensor.is_contiguous()))


_RULES: dict[OpOverload, ScratchRule] = {
    **{func: partial(peak_of_convolution, func) for func in CONVOLUTIONS},
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.sum.default: _sum,
    aten.mean.dim: _mean,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}

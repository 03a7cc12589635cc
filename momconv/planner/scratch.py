"""What an operation's CPU kernel allocates for itself and frees before it returns.

Fake tensors show what an operation returns, not this. The rules say how many bytes are alive at
most while an operation runs, its results included, as a function of its arguments. They were read
off PyTorch's allocator, one operation at a time, and hold for PyTorch's CPU kernels and oneDNN's;
oneDNN's choice of algorithm, and with it a convolution's scratch, depends on the processor.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
Arguments = tuple[Any, ...]
Rule = Callable[[Arguments, Sequence[Tensor]], int]

_FLOAT = 4  # bytes
_IMAGE_CHANNELS = 3  # up to so many, oneDNN reads the input of a convolution as it is
_LARGEST_DIRECT_KERNEL = 14  # oneDNN's direct gradient of weights has no larger ones
_LARGEST_DEPTHWISE_KERNEL = 3  # the same, for groups of one channel in blocks
_COLUMN_BYTES = 256  # the fixed part of the scratch of a gradient by im2col
_WIDE_GROUP = 16  # channels
_STRIDED_BYTES = 28 * 2**10  # the fixed part of the scratch of a strided convolution's gradient


def peak_within(func: OpOverload, args: Arguments, results: Sequence[Tensor]) -> int:
    """The most bytes that ``func(*args)`` adds to the live memory while it runs; 0 if unknown."""
    if func in _RULES:
        return _RULES[func](args, results)
    return _casts(args, results) if torch.Tag.pointwise in func.tags else 0


def _casts(args: Arguments, results: Sequence[Tensor]) -> int:
    """An elementwise operation on mixed types first copies its arguments to the common type."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor) and leaf.dim()]
    if len({tensor.dtype for tensor in tensors}) < 2:
        return 0
    common = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    copies = sum(t.numel() * common.itemsize for t in tensors if t.dtype != common)
    return copies + _bytes(*(r for r in results if all(r is not t for t in tensors)))


def _batch_norm_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    """A second gradient of the input, which is copied into the first."""
    x = args[1]
    return _bytes(*results) + (_bytes(x) if results and results[0].shape == x.shape else 0)


def _layer_norm(args: Arguments, results: Sequence[Tensor]) -> int:
    return _bytes(*results) + _copies(args[0])


def _layer_norm_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    """Copies without gaps, and each thread's own gradients of weight and bias."""
    gradient, x, shape = args[:3]
    sums: int = 2 * torch.get_num_threads() * math.prod(shape) * x.element_size()
    return _bytes(*results) + _copies(gradient, x) + sums


def _sum(args: Arguments, results: Sequence[Tensor]) -> int:
    """Integers are added as int64, in a copy."""
    x = args[0]
    copied = not x.dtype.is_floating_point and x.dtype != results[0].dtype
    return _bytes(*results) + (x.numel() * results[0].element_size() if copied else 0)


def _mean(args: Arguments, results: Sequence[Tensor]) -> int:
    """Half precision is averaged in single precision, in a copy."""
    x = args[0]
    copied = x.element_size() < _FLOAT and x.dtype.is_floating_point
    return _bytes(*results) + (_FLOAT * (x.numel() + results[0].numel()) if copied else 0)


# Attention, whose blocks are PyTorch's


def _attention(args: Arguments, results: Sequence[Tensor]) -> int:
    """Each thread's block of scores, their maxima and sums, and of the output."""
    query, key = args[:2]
    rows, columns = _score_block(query, key)
    scores = rows * columns
    scratch = scores + 2 * rows + rows * query.shape[-1]
    return _bytes(*results) + _per_thread(scratch, scores, query)


def _attention_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    """Each thread's block of scores and of their gradients."""
    gradient, query, key = args[:3]
    rows, columns = _score_block(query, key)
    scratch = 2 * rows * columns
    return _bytes(*results) + _copies(gradient) + _per_thread(scratch, scratch, query)


def _score_block(query: Tensor, key: Tensor) -> tuple[int, int]:
    length = query.shape[-2]
    rows = 256 if length >= 768 else 64 if length >= 192 else 32
    return min(rows, length), min(512, key.shape[-2])


def _per_thread(floats: int, narrow: int, query: Tensor) -> int:
    """Bytes of so many floats a thread, of which ``narrow`` are kept in half precision as well."""
    half = query.element_size() if query.element_size() < _FLOAT else 0
    return torch.get_num_threads() * (floats * _FLOAT + narrow * half)


# Convolutions


@dataclass(frozen=True, slots=True)
class _Convolution:
    """A convolution and what its kernels copy."""

    x: Tensor
    weight: Tensor
    y: Tensor  # or its gradient
    stride: Sequence[int]
    padding: Sequence[int]
    groups: int

    @property
    def kernel(self) -> Sequence[int]:
        return self.weight.shape[2:]

    @property
    def is_strided(self) -> bool:
        return max(self.stride) > 1

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.weight.shape[1] == 1 and self.groups == len(self.weight)

    @property
    def is_channels_last(self) -> bool:
        last = torch.channels_last
        return not self.x.is_contiguous() and self.x.is_contiguous(memory_format=last)

    @property
    def is_pointwise(self) -> bool:
        return math.prod(self.kernel) == 1

    @property
    def columns(self) -> int:
        """Bytes of im2col's matrix for one image."""
        inputs = self.weight[0].numel()
        return int(inputs * math.prod(self.y.shape[2:]) * self.x.element_size())

    @property
    def copied_columns(self) -> int:
        """As ``columns``, but 0 where the image itself is the matrix."""
        is_matrix = self.is_pointwise and not self.is_strided and not any(self.padding)
        return 0 if is_matrix else self.columns

    @property
    def blocked_x(self) -> int:
        return 0 if self.x.shape[1] <= _IMAGE_CHANNELS else _blocked(self.x)

    @property
    def blocked_weight(self) -> int:
        """Bytes of the weight with its outputs and, within a group, its inputs in blocks."""
        per_group = len(self.weight) // self.groups
        outputs, inputs = (_in_blocks(n) for n in (per_group, self.weight.shape[1]))
        if self.is_depthwise:
            outputs, inputs = 1, 1
        elif self.x.shape[1] <= _IMAGE_CHANNELS:
            inputs = self.weight.shape[1]
        area = math.prod(self.kernel) * self.weight.element_size()
        return int(self.groups * outputs * inputs * area)

    @property
    def weight_copy(self) -> int:
        """Bytes of the weight brought to the layout of a channels-last input."""
        ready = self.weight.is_contiguous(memory_format=torch.channels_last)
        return _bytes(self.weight) if self.is_channels_last and not ready else 0

    @property
    def needs_strided_gradient(self) -> bool:
        """Whether oneDNN computes the input's gradient channels-last, by matrix products."""
        wide = self.groups == 1 or self.weight.shape[1] >= _WIDE_GROUP
        return self.is_strided and wide

    @property
    def needs_columns(self) -> bool:
        """Whether oneDNN has no direct algorithm: of groups that do not fill its blocks."""
        per_group = self.weight.shape[1]
        return self.groups > 1 and not self.is_depthwise and per_group != _in_blocks(per_group)

    @property
    def gradient_needs_columns(self) -> bool:
        """The same for the weight's gradient: also of kernels of a certain size.

        Without AVX-512 these are all that are larger than the image.
        """
        blocked = self.is_depthwise and not self.is_channels_last
        largest = _LARGEST_DEPTHWISE_KERNEL if blocked else _LARGEST_DIRECT_KERNEL
        narrow = self.x.shape[-1] < self.kernel[-1] and not _has_avx512()
        return narrow or self.needs_columns or max(self.kernel) > largest


def _convolution(args: Arguments, results: Sequence[Tensor]) -> int:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    conv = _Convolution(x, weight, results[0], stride, padding, groups)
    backend = torch._C._select_conv_backend(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return _onednn_forward(conv) if backend.name == "Mkldnn" else _native_forward(conv)


def _native_forward(conv: _Convolution) -> int:
    """PyTorch's own: im2col of the whole batch, group by group."""
    y = _bytes(conv.y)
    parts = y if conv.groups > 1 else 0
    return y + parts + len(conv.x) * conv.copied_columns // conv.groups + conv.weight_copy


def _onednn_forward(conv: _Convolution) -> int:
    """Input, weight and output are reordered to blocks of channels, and the output back."""
    y, threads = _bytes(conv.y), torch.get_num_threads()
    if conv.needs_columns:
        return max(threads * conv.columns + y, 2 * y)
    if conv.is_channels_last:
        return conv.weight_copy + y + conv.blocked_weight
    skipping = threads * conv.columns if conv.is_pointwise and conv.is_strided else 0
    blocked_y = _blocked(conv.y)
    return max(skipping + conv.blocked_x + conv.blocked_weight + blocked_y, blocked_y + y)


def _convolution_backward(args: Arguments, results: Sequence[Tensor]) -> int:
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, *rest = args
    output_padding, groups, wanted = rest
    conv = _Convolution(x, weight, gradient, stride, padding, groups)
    sizes = (stride, padding, dilation, transposed, output_padding, groups, bias_sizes)
    backend = torch._C._select_conv_backend(x, weight, None, *sizes)
    if backend.name == "Mkldnn":
        return _onednn_backward(conv, wanted)
    return _native_backward(conv, results)


def _native_backward(conv: _Convolution, results: Sequence[Tensor]) -> int:
    parts = _bytes(*results) if conv.groups > 1 else 0
    columns = len(conv.x) * conv.copied_columns // conv.groups
    copy = _gradient_copy(conv) // conv.groups
    return _bytes(*results) + parts + columns + copy + conv.weight_copy


def _onednn_backward(conv: _Convolution, wanted: Sequence[bool]) -> int:
    """First the gradient of the input, then the weight's, each reordered like the forward pass."""
    held = conv.weight_copy + _gradient_copy(conv)
    peak = 0
    if wanted[0]:
        peak = held + _onednn_input_gradient(conv)
        held += _bytes(conv.x)
    return max(peak, held + _onednn_weight_gradient(conv)) if wanted[1] else peak


def _onednn_input_gradient(conv: _Convolution) -> int:
    x = _bytes(conv.x)
    if conv.needs_columns:
        return max(x + torch.get_num_threads() * conv.columns, 2 * x)
    scratch = _strided_scratch(conv) if conv.needs_strided_gradient else 0
    if conv.is_channels_last:
        return x + conv.blocked_weight + scratch
    if conv.needs_strided_gradient:
        return max(_bytes(conv.y) + conv.blocked_weight + x + scratch, 3 * x)
    blocked_x = _blocked(conv.x)
    return max(_blocked(conv.y) + conv.blocked_weight + blocked_x, blocked_x + x)


def _strided_scratch(conv: _Convolution) -> int:
    """Each thread's padded output gradient of one image, for all outputs."""
    height, width = conv.y.shape[2:]
    area = height * _in_blocks(width + conv.kernel[1] // 2)
    outputs = conv.y.shape[1]
    return int(torch.get_num_threads() * outputs * area * _FLOAT) + _STRIDED_BYTES


def _onednn_weight_gradient(conv: _Convolution) -> int:
    weight, threads = _bytes(conv.weight), torch.get_num_threads()
    if conv.gradient_needs_columns:
        # oneDNN counts each thread's sum in bytes and takes them for floats.
        sums = _FLOAT * weight
        return weight + max(threads * (sums + conv.columns) + _COLUMN_BYTES, weight)
    if conv.is_channels_last:
        blocks = _in_blocks(1) ** 2 if conv.is_depthwise else 1
        return blocks * weight + 2 * weight
    return max(conv.blocked_x + _blocked(conv.y) + conv.blocked_weight, 2 * weight)


def _gradient_copy(conv: _Convolution) -> int:
    """Bytes of the output's gradient brought to the layout of the convolution."""
    layout = torch.channels_last if conv.is_channels_last else torch.contiguous_format
    return 0 if conv.y.is_contiguous(memory_format=layout) else _bytes(conv.y)


def _blocked(x: Tensor) -> int:
    """Bytes of x with its channels in whole blocks."""
    return int(_bytes(x) // x.shape[1] * _in_blocks(x.shape[1]))


def _in_blocks(channels: int) -> int:
    """Channels, rounded up to whole vectors of the processor."""
    vector = 16 if _has_avx512() else 8
    return math.ceil(channels / vector) * vector


def _has_avx512() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _copies(*tensors: Tensor) -> int:
    """Bytes of the copies of those that have gaps or another order in memory."""
    return _bytes(*(tensor for tensor in tensors if not tensor.is_contiguous()))


_RULES: dict[OpOverload, Rule] = {
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.sum.default: _sum,
    aten.mean.dim: _mean,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
}

"""What the CPU kernels of a convolution allocate for themselves, and the copies that they need."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from momconv.planner import bf16_scratch
from momconv.planner.convolution import (
    BLOCK,
    FLOAT,
    PAIRS,
    Convolution,
    blocked,
    has_avx512,
    in_blocks,
    in_pairs,
    round_up,
)

_IMAGE_WEIGHT = 4  # dimensions: outputs, inputs, height and width
_LARGEST_DIRECT_KERNEL = 14  # oneDNN's direct gradient of weights has no larger ones
_LARGEST_DEPTHWISE_KERNEL = 3  # the same, for groups of one channel in blocks
_COLUMN_BYTES = 256  # the fixed part of the scratch of a gradient by im2col
_WIDE_GROUP = 16  # channels
_STRIDED_BYTES = 28 * 2**10  # the fixed part of the scratch of a strided convolution's gradient


def forward(args: tuple[Any, ...], results: Sequence[Tensor]) -> int:
    """Return the most bytes alive in a convolution of images; 0 (unknown) in any other one."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if weight.dim() != _IMAGE_WEIGHT:
        return 0
    conv = Convolution(x, weight, results[0], stride, padding, groups)
    backend = torch._C._select_conv_backend(
        x, weight, bias, stride, padding, dilation, transposed, output_padding, groups
    )
    return _onednn_forward(conv) if backend.name == "Mkldnn" else _native_forward(conv)


def backward(args: tuple[Any, ...], results: Sequence[Tensor]) -> int:
    """Return the most bytes alive in the gradient of a convolution, as :func:`forward`."""
    gradient, x, weight, bias_sizes, stride, padding, dilation, transposed, *rest = args
    if weight.dim() != _IMAGE_WEIGHT:
        return 0
    output_padding, groups, wanted = rest
    conv = Convolution(x, weight, gradient, stride, padding, groups)
    sizes = (stride, padding, dilation, transposed, output_padding, groups, bias_sizes)
    backend = torch._C._select_conv_backend(x, weight, None, *sizes)
    if backend.name == "Mkldnn":
        return _onednn_backward(conv, wanted)
    return _native_backward(conv, results)


# PyTorch's own: im2col of the whole batch, group by group


def _native_forward(conv: Convolution) -> int:
    y = conv.y.nbytes
    parts = y if conv.groups > 1 else 0
    return y + parts + len(conv.x) * conv.copied_columns // conv.groups + conv.weight_copy


def _native_backward(conv: Convolution, results: Sequence[Tensor]) -> int:
    gradients = sum(tensor.nbytes for tensor in results)
    parts = gradients if conv.groups > 1 else 0
    columns = len(conv.x) * conv.copied_columns // conv.groups
    copy = _gradient_copy(conv) // conv.groups
    return gradients + parts + columns + copy + conv.weight_copy


# oneDNN's: input, weight and output are reordered, and the output back


def _onednn_forward(conv: Convolution) -> int:
    y, weight = conv.y.nbytes, conv.blocked_weight
    if _needs_columns(conv):
        return max(torch.get_num_threads() * conv.columns + y, 2 * y)
    if conv.is_tiled:
        weight = conv.weight_of(round_up(conv.outputs, BLOCK), in_pairs(conv.inputs))
    scratch = bf16_scratch.forward(conv) if conv.is_bf16 else 0
    if conv.is_channels_last:
        return conv.weight_copy + y + weight + scratch
    if conv.is_tiled:
        return max(scratch + conv.x.nbytes + weight + y, 3 * y)
    if not conv.is_bf16 and conv.is_pointwise and conv.is_strided:
        scratch = torch.get_num_threads() * conv.columns  # without the pixels that are skipped
    blocked_y = blocked(conv.y)
    return max(scratch + conv.blocked_x + weight + blocked_y, blocked_y + y)


def _onednn_backward(conv: Convolution, wanted: Sequence[bool]) -> int:
    """Return the bytes of the gradients, first the input's, then the weight's, each reordered."""
    held = conv.weight_copy + _gradient_copy(conv)
    peak = 0
    if wanted[0]:
        peak = held + _onednn_input_gradient(conv)
        held += conv.x.nbytes
    if wanted[2] and conv.is_bf16:
        sums = conv.groups * round_up(conv.outputs, BLOCK)
        held += FLOAT * sums + conv.x.element_size() * len(conv.weight)  # of the bias
    return max(peak, held + _onednn_weight_gradient(conv)) if wanted[1] else peak


def _onednn_input_gradient(conv: Convolution) -> int:
    x = conv.x.nbytes
    if _needs_columns(conv):
        return max(x + torch.get_num_threads() * conv.columns, 2 * x)
    weight, scratch = conv.blocked_weight, 0
    are_products = _needs_strided_gradient(conv) or (conv.is_tiled and not conv.is_strided)
    if conv.is_bf16:
        scratch = bf16_scratch.input_gradient(conv)
        if are_products or not conv.is_depthwise:
            weight = conv.weight_of(in_pairs(conv.outputs), round_up(conv.inputs, BLOCK))
    elif are_products:
        scratch = _strided_scratch(conv)
    if conv.is_channels_last:
        return x + weight + scratch
    if are_products:
        return max(conv.y.nbytes + weight + x + scratch, 3 * x)
    blocked_x = blocked(conv.x)
    return max(blocked(conv.y) + weight + blocked_x + scratch, blocked_x + x)


def _needs_strided_gradient(conv: Convolution) -> bool:
    """Return whether oneDNN computes the input's gradient channels-last, by matrix products."""
    if conv.is_bf16:
        return bf16_scratch.needs_strided_gradient(conv)
    return conv.is_strided and (conv.groups == 1 or conv.inputs >= _WIDE_GROUP)


def _strided_scratch(conv: Convolution) -> int:
    """Return the bytes of each thread's padded output gradient of one image, for all outputs."""
    height, width = conv.y.shape[2:]
    area = height * in_blocks(width + conv.kernel[1] // 2)
    outputs = conv.y.shape[1]
    return int(torch.get_num_threads() * outputs * area * FLOAT) + _STRIDED_BYTES


def _onednn_weight_gradient(conv: Convolution) -> int:
    weight = conv.weight.nbytes
    if _gradient_needs_columns(conv):
        return weight + max(_column_scratch(conv), weight)
    scratch = bf16_scratch.weight_gradient(conv) if conv.is_bf16 else 0
    if conv.is_tiled:
        blocks = conv.weight_of(round_up(conv.outputs, BLOCK), round_up(conv.inputs, PAIRS))
        copies = 0 if conv.is_channels_last else conv.x.nbytes + conv.y.nbytes
        return blocks + max(copies + scratch, 2 * weight if conv.is_channels_last else weight)
    if conv.is_channels_last:
        are_blocked = conv.is_depthwise and not (conv.is_bf16 and conv.is_small_depthwise)
        blocks = in_blocks(1) ** 2 if are_blocked else 1
        return blocks * weight + max(2 * weight, scratch)
    return max(conv.blocked_x + blocked(conv.y) + conv.blocked_weight + scratch, 2 * weight)


def _needs_columns(conv: Convolution) -> bool:
    """Return whether oneDNN has no direct algorithm: of groups that do not fill its blocks."""
    fills = conv.inputs == in_blocks(conv.inputs)
    return conv.groups > 1 and not (conv.is_depthwise or conv.is_tiled or fills)


def _gradient_needs_columns(conv: Convolution) -> bool:
    """Return the same for the weight's gradient: also of kernels of a certain size.

    Without AVX-512 these are all that are larger than the image.
    """
    if conv.is_tiled or (conv.is_bf16 and conv.groups == 1):
        return False
    blocked = conv.is_depthwise and not conv.is_channels_last
    largest = _LARGEST_DEPTHWISE_KERNEL if blocked else _LARGEST_DIRECT_KERNEL
    narrow = conv.x.shape[-1] < conv.kernel[-1] and not has_avx512()
    return narrow or _needs_columns(conv) or max(conv.kernel) > largest


def _column_scratch(conv: Convolution) -> int:
    """Return the bytes of each thread's matrix and sums, which oneDNN takes for floats."""
    threads = torch.get_num_threads()
    sums = threads + 1 if conv.is_bf16 else threads
    return sums * FLOAT * conv.weight.nbytes + threads * conv.columns + _COLUMN_BYTES


def _gradient_copy(conv: Convolution) -> int:
    """Return the bytes of the output's gradient brought to the layout of the convolution."""
    layout = torch.channels_last if conv.is_channels_last else torch.contiguous_format
    return 0 if conv.y.is_contiguous(memory_format=layout) else conv.y.nbytes

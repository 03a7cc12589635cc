"""What oneDNN's convolutions allocate for themselves in bf16, on a processor with AVX-512.

Their sums are in single precision, and what they multiply is copied into an order of its own; on
tiles (AMX) all are products of matrices. The formulas are those of oneDNN 3.12
(jit_brgemm_conv_utils.cpp and its neighbours), without cases that networks for images have no use
for. Where oneDNN takes the way that it estimates to be the fastest, the largest is assumed.
"""

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch

from momconv.planner.convolution import (
    BLOCK,
    FLOAT,
    PAIRS,
    Convolution,
    ceil_div,
    in_pairs,
    round_up,
    supports,
)

_BF16 = 2  # bytes
_PAGE = 4096  # bytes, to which what a thread writes is aligned
_LIST = 4120  # bytes of a thread's list of the matrices to multiply
_TILES = 2 * _PAGE  # bytes to which a thread puts tiles aside
_NESTED = 128  # bytes of an algorithm that calls another
_FEW_INPUTS = 16  # with fewer, the rows of the kernel are laid side by side
_FEW_PIXELS = 128  # rows that are computed at a time have more, or fill a larger cache
_FILLED = 0.9  # or the last rows are too few
_L2_FOR_ROWS = 0.375  # the part of the second cache that these rows may fill
_L2_FOR_LINES = 0.6  # the same in a gradient of the weight
_LONG_LINE = 28  # pixels; shorter ones are put together, for a kernel of a pixel
_LONG_ROW = 48  # pixels
_WIDE = 64  # channels
_BARRIER = 2 * _PAGE  # bytes for threads to wait for each other
_FIXED = 17024  # bytes of a gradient of the weight on tiles
_FIXED_UNTILED = 8584  # the same without tiles
_CHUNK = 128  # input channels that are transposed at a time, for a kernel of a pixel


def forward(conv: Convolution) -> int:
    """Return the scratch of a forward pass."""
    if conv.is_tiled:
        return _product(_Product.of_output(conv))
    skipping = conv.columns if conv.is_strided else 0
    return _untiled(conv, FLOAT * math.prod(conv.y.shape[1:]) + skipping)


def input_gradient(conv: Convolution) -> int:
    """Return the scratch of the gradient of the input."""
    if needs_strided_gradient(conv):
        return _strided_product(conv)
    if conv.is_tiled and not conv.is_strided:
        return _product(_Product.of_input_gradient(conv)) + _NESTED
    skipping = _BF16 if conv.is_strided else 0
    sums = (FLOAT + skipping) * conv.x.shape[1] * math.prod(conv.y.shape[2:])
    return _untiled(conv, sums)


def needs_strided_gradient(conv: Convolution) -> bool:
    """Return whether the input's gradient is computed channels-last, pixel by pixel of a stride."""
    wide = conv.groups == 1 or conv.is_depthwise or conv.inputs >= BLOCK
    return conv.is_strided and wide and supports("avx512_bf16")


def weight_gradient(conv: Convolution) -> int:
    """Return the scratch of the gradient of the weight."""
    if conv.is_small_depthwise:
        return torch.get_num_threads() * FLOAT * conv.weight.numel() + _NESTED
    if conv.is_tiled:
        return _tiled_weight_gradient(conv)
    if conv.is_pointwise:
        return _pointwise_weight_gradient(conv)
    return _transposing_weight_gradient(conv)


def _untiled(conv: Convolution, sums: int) -> int:
    """Return the bytes of each thread's sums of an image, for kernels of a pixel."""
    if conv.is_channels_last and not conv.is_depthwise and supports("avx512_bf16"):
        return _lists(conv) + _NESTED
    return torch.get_num_threads() * sums if conv.is_pointwise else 0


def _lists(conv: Convolution) -> int:
    """Return the bytes of each thread's list of matrices, and of its tiles."""
    if conv.is_tiled:
        return torch.get_num_threads() * (_LIST + _TILES) + 2 * _PAGE
    return torch.get_num_threads() * _LIST + _PAGE


# Products of matrices


@dataclass(frozen=True, slots=True)
class _Product:
    """A convolution, or the gradient of its input, as products of tiles."""

    conv: Convolution
    _: KW_ONLY
    inputs: int  # of a group
    outputs: int
    read: Sequence[int]  # height and width, as below
    made: Sequence[int]
    kernel: Sequence[int]
    stride: Sequence[int]
    is_reordered: bool = False  # whether the weight is copied once more, for a few inputs
    is_unfolded: bool = False  # whether the rows of the kernel are then laid side by side

    @staticmethod
    def of_output(conv: Convolution) -> "_Product":
        (tall, wide), (down, across), (height, width) = conv.kernel, conv.stride, conv.x.shape[2:]
        merged = _merge(conv)
        broad = conv.y.shape[3]
        are_few = wide > 1 and merged == 1 and conv.inputs < _FEW_INPUTS
        return _Product(
            conv,
            inputs=conv.inputs * merged,
            outputs=conv.outputs,
            read=(height, width // merged),
            made=conv.y.shape[2:],
            kernel=(tall, wide // merged),
            stride=(down, across // merged),
            is_reordered=are_few,
            is_unfolded=are_few and (broad % BLOCK == 0 or broad > _LONG_ROW),
        )

    @staticmethod
    def of_input_gradient(conv: Convolution) -> "_Product":
        return _Product(
            conv,
            inputs=conv.outputs,
            outputs=conv.inputs,
            read=conv.y.shape[2:],
            made=conv.x.shape[2:],
            kernel=conv.kernel,
            stride=(1, 1),
        )

    @property
    def padded(self) -> list[int]:
        """Height and width of what is read."""
        sizes = zip(self.made, self.stride, self.kernel, strict=True)
        return [(made - 1) * stride + kernel for made, stride, kernel in sizes]

    @property
    def channels(self) -> int:
        """The inputs in whole rows of a tile."""
        if self.is_unfolded:
            return self.inputs
        return in_pairs(self.inputs)


def _merge(conv: Convolution) -> int:
    """Return how many pixels of a line count as channels, as separate kernels allow."""
    if any(conv.padding) or conv.groups > 1 or conv.inputs % 2:
        return 1
    sizes = conv.x.shape[3], conv.kernel[1], conv.stride[1]
    return max(
        pixels
        for pixels in range(1, min(sizes) + 1)
        if all(size % pixels == 0 for size in sizes)
        and (pixels * conv.inputs <= PAIRS or pixels * conv.inputs % PAIRS == 0 or pixels == 1)
    )


def _product(product: _Product) -> int:
    lists = _lists(product.conv)
    if product.conv.is_pointwise and not product.conv.is_strided:
        return lists
    if product.conv.is_pointwise and max(product.stride) > 1:
        pixels = product.conv.groups * product.inputs * math.prod(product.made)
        share = _BF16 * pixels + 64
    else:
        blocks = {min(block, round_up(product.outputs, BLOCK)) for block in (32, 64)}
        share = max(_copied(product, block) for block in blocks) + _PAGE
    if product.is_reordered:
        line = round_up(product.kernel[1] * product.inputs, PAIRS)
        lists += _BF16 * len(product.conv.weight) * product.kernel[0] * line + _PAGE
    return lists + torch.get_num_threads() * share + 2 * _PAGE


def _copied(product: _Product, block: int) -> int:
    """Return the bytes of the padded lines that a thread copies for a block of outputs."""
    (height, width), (tall, wide) = product.padded, product.kernel
    down, across = product.stride
    if product.is_unfolded:
        rows, gap, copies = 1, 0, tall**2
    else:
        rows, copies = _rows(product, block), 1
        gap = (wide - 1) // across * down + (down - 1) * product.made[1]
    lines = min(height, (rows - 1) * min(down, tall) + tall) + max(0, height - product.read[0])
    part = _cover(rows, product.made[1], gap)
    lines = ceil_div(round_up(lines * width, part), width) + tall
    pixels = copies * lines * width * across
    return round_up(_BF16 * pixels * product.conv.groups * product.channels, 2 * _PAGE)


def _cover(rows: int, width: int, gap: int) -> int:
    """Return the pixels that tiles cover of rows with gaps, none of which begins in a gap."""
    covered = 0
    while covered < rows * width + (rows - 1) * gap:
        covered += BLOCK if covered % (width + gap) < width else 1
    return covered


def _rows(product: _Product, block: int) -> int:
    """Return the rows of the output that a thread computes at a time: such as fit into a cache."""
    (height, width), wide = product.made, product.padded[1]
    read, made = _BF16 * product.channels * wide, _BF16 * block * width
    rows = min(height, max(1, int(_L2_FOR_ROWS * _cache("l2") / (2 * read + made))))
    for fewer in range(min(height, _cache("l1d") // (read + made)) or rows, 0, -1):
        if fewer * wide > _FEW_PIXELS and height > _FILLED * round_up(height, fewer):
            rows = fewer
            break
    shares = len(product.conv.x) * product.conv.groups * ceil_div(product.outputs, BLOCK)
    return min(rows, ceil_div(height, ceil_div(torch.get_num_threads(), shares)))


def _cache(name: str) -> int:
    """Return the bytes of a core's cache."""
    return int(torch.cpu.get_capabilities()[f"{name}_cache_size"])


def _strided_product(conv: Convolution) -> int:
    """Return the bytes of each thread's padded output gradient of one image, and of its sums."""
    area = 1
    sides = conv.x.shape[2:], conv.y.shape[2:], conv.kernel, conv.stride, conv.padding
    for read, made, kernel, stride, padding in zip(*sides, strict=True):
        end = (made - 1) * stride + kernel - read - padding
        area *= made + sum(max(0, kernel - 1 - side) // stride for side in (padding, end))
    copied = round_up(_BF16 * conv.groups * conv.outputs * area, 2 * _PAGE)
    sums = FLOAT * min(_WIDE, round_up(conv.inputs, BLOCK)) * conv.y.shape[3]
    return _lists(conv) + torch.get_num_threads() * (copied + _PAGE + sums) + 3 * _PAGE


# Gradients of weights


class _Share(NamedTuple):
    """Among how many threads each is divided.

    Each thread that has some of the images has sums of its own.
    """

    images: int
    outputs: int
    inputs: int

    @property
    def waiting(self) -> int:
        """Bytes for those that need the same to wait for each other."""
        of_inputs = self.images * self.inputs if self.outputs > 1 else 0
        return _BARRIER * (of_inputs + (self.images * self.outputs if self.inputs > 1 else 0))


@dataclass(frozen=True, slots=True)
class _Lines:
    """What is multiplied for a gradient of the weight: lines of pixels, channel by channel."""

    conv: Convolution
    _: KW_ONLY
    x_lines: int  # of an image
    x_pixels: int  # of a line
    y_lines: int
    y_pixels: int

    @property
    def inputs(self) -> int:
        """Of a group, in whole blocks."""
        is_image = self.conv.blocked_x == 0 and not self.conv.is_tiled
        return self.conv.inputs if is_image else round_up(self.conv.inputs, BLOCK)

    @property
    def outputs(self) -> int:
        """Of a group, in whole blocks."""
        return round_up(self.conv.outputs, BLOCK)

    @property
    def sums(self) -> int:
        """Bytes of the weight's gradient in single precision."""
        return self.conv.weight_of(self.outputs, self.inputs) * FLOAT // _BF16

    @property
    def step(self) -> int:
        """Channels that are multiplied at once."""
        return PAIRS if self.conv.is_tiled else BLOCK

    def share(self) -> _Share:
        """Return how the work is divided among threads."""
        threads = torch.get_num_threads() // self.conv.groups
        if threads < 2:
            return _Share(1, 1, 1)
        wide = min(self.conv.inputs, self.conv.outputs) >= _WIDE
        if self.conv.is_tiled and wide and len(self.conv.x) <= threads // 2:
            return self._share_few_images(threads)
        most = max(1, self.inputs // self.step)
        shares = [
            _Share(images, outputs, min(threads // images // outputs, most))
            for images in range(threads, 0, -1)
            for outputs in range(min(threads // images, ceil_div(self.outputs, self.step)), 0, -1)
        ]
        return min(shares, key=self._cost)

    def _share_few_images(self, threads: int) -> _Share:
        """Pixels, inputs and outputs are cut into pieces like cubes, tiles being their units."""
        area = math.prod(self.conv.kernel)
        pixels = len(self.conv.x) * math.prod(self.conv.y.shape[2:]) / PAIRS
        inputs, outputs = 5 * self.inputs * area / BLOCK, 3 * self.outputs * area / BLOCK
        side = (pixels * inputs * outputs / threads) ** (1 / 3)
        images = min(threads, max(1, round(pixels / side)))
        return _Share(images, 1, min(threads // images, max(1, self.inputs // self.step)))

    def _cost(self, share: _Share) -> float:
        """Return what a thread reads and writes, weighted as oneDNN does."""
        area, ratio = math.prod(self.conv.kernel), self.outputs / self.inputs
        x_line = self.x_lines * self.x_pixels / self.y_lines
        lines = len(self.conv.x) * self.y_lines
        tensors = _BF16 * lines * (self.conv.inputs * x_line + self.conv.outputs * self.y_pixels)
        excess = tensors / 2 / (FLOAT * self.conv.inputs * self.conv.outputs * area)
        weights = [max(1, 1 / ratio), max(1, ratio), max(1, excess)]
        step, mine = self.step, ceil_div(lines, share.images)
        inputs = ceil_div(ceil_div(self.inputs, step), share.inputs) * step
        outputs = ceil_div(ceil_div(self.outputs, step), share.outputs) * step
        sum_bytes = FLOAT / _BF16
        if self.conv.is_tiled:  # it takes chunks of outputs for outputs
            outputs = round_up(ceil_div(self.outputs, step * share.outputs), step)
        else:
            weights, sum_bytes = [int(weight) for weight in weights], 1
        x = weights[0] * (4 if excess < 1 else 1) * mine * inputs * x_line
        y = weights[1] * mine * outputs * self.y_pixels
        return (
            x / math.prod(self.conv.stride) + y + weights[2] * sum_bytes * inputs * outputs * area
        )


def _tiled_weight_gradient(conv: Convolution) -> int:
    """Return the bytes of sums, and of transposed lines that fit into the second cache."""
    (height, width), (high, broad) = conv.x.shape[2:], conv.y.shape[2:]
    if conv.is_product and width <= _LONG_LINE:
        height, high, broad = 1, 1, high * broad
    down, across = conv.stride
    read = round_up(ceil_div((broad - 1) * across + conv.kernel[1], across), PAIRS) * across
    parts = ceil_div(broad, PAIRS)
    lines = _Lines(
        conv,
        x_lines=height,
        x_pixels=read,
        y_lines=high,
        y_pixels=parts * round_up(ceil_div(broad, parts), 2),
    )
    share = lines.share()
    x_line, y_line = _BF16 * lines.x_pixels * lines.inputs, _BF16 * lines.y_pixels * lines.outputs
    # With what they are transposed from, a thread's lines are twice as long.
    x_used = 2 * ceil_div(lines.inputs // BLOCK, share.inputs) * _BF16 * lines.x_pixels * BLOCK
    y_used = 2 * ceil_div(lines.outputs // BLOCK, share.outputs) * _BF16 * lines.y_pixels * BLOCK
    space = _L2_FOR_LINES * _cache("l2") - conv.kernel[0] * x_used
    rows = ceil_div(high, ceil_div(high, max(1, int(space / (x_used + y_used)))))
    reach = min(height, (rows - 1) * min(conv.stride[0], conv.kernel[0]) + conv.kernel[0])
    copies = conv.groups * (min(height, down * reach) * x_line + rows * y_line)
    fixed = _FIXED + torch.get_num_threads() * (_LIST + _TILES)
    guard = _BF16 * lines.x_pixels * BLOCK
    return share.images * (copies + lines.sums) + guard + share.waiting + fixed


def _transposing_weight_gradient(conv: Convolution) -> int:
    """Return the bytes of sums, and of an image of each thread that has some."""
    (height, width), (high, broad) = conv.x.shape[2:], conv.y.shape[2:]
    across, padding = conv.stride[1], conv.padding[1]
    end = (broad - 1) * across + conv.kernel[1] - width - padding
    read = (ceil_div(width, across) + round_up(max(padding, end + 1), 2)) * across
    written = round_up(broad, 2)
    lines = _Lines(conv, x_lines=height, x_pixels=read, y_lines=high, y_pixels=written)
    share = lines.share()
    x_copy = height * read * lines.inputs
    if conv.blocked_x == 0 and not conv.is_channels_last:
        x_copy = 0  # images are read as they are
    copies = _BF16 * conv.groups * (x_copy + high * lines.y_pixels * lines.outputs)
    return share.images * (copies + lines.sums) + share.waiting + _FIXED_UNTILED


def _pointwise_weight_gradient(conv: Convolution) -> int:
    """Return the bytes of sums, and of each thread's pixels that are not in order."""
    area = math.prod(conv.y.shape[2:])
    (height, width), (high, broad) = conv.x.shape[2:], conv.y.shape[2:]
    lines = _Lines(conv, x_lines=height, x_pixels=width, y_lines=high, y_pixels=broad)
    is_ordered = area % BLOCK == 0 and not conv.is_channels_last
    channels = 0 if is_ordered else min(conv.inputs, _CHUNK) + conv.outputs
    transposed = torch.get_num_threads() * _BF16 * channels * area
    return lines.share().images * lines.sums + transposed

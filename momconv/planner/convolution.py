"""A convolution as oneDNN sees it: its shape, and the layouts to which its tensors are copied."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

FLOAT = 4  # bytes
BLOCK = 16  # channels, and rows of a tile
PAIRS = 32  # channels in a row of a tile
_IMAGE_CHANNELS = 3  # up to so many, oneDNN reads the input of a convolution as it is
_SMALL_KERNEL = 3  # up to this, groups of one channel are computed without blocks of weights


@dataclass(frozen=True, slots=True)
class Convolution:
    """A convolution and what its kernels copy."""

    x: Tensor
    weight: Tensor
    y: Tensor  # or its gradient
    stride: Sequence[int]
    padding: Sequence[int]
    groups: int

    @property
    def kernel(self) -> Sequence[int]:
        """Height and width."""
        return self.weight.shape[2:]

    @property
    def inputs(self) -> int:
        """Of a group."""
        return self.weight.shape[1]

    @property
    def outputs(self) -> int:
        """Of a group."""
        return len(self.weight) // self.groups

    @property
    def is_strided(self) -> bool:
        """Whether it skips pixels."""
        return max(self.stride) > 1

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is a group."""
        return self.groups > 1 and self.inputs == 1 and self.groups == len(self.weight)

    @property
    def is_small_depthwise(self) -> bool:
        """Whether its weight is not put into blocks."""
        return self.is_depthwise and max(self.kernel) <= _SMALL_KERNEL

    @property
    def is_channels_last(self) -> bool:
        """Whether PyTorch keeps it channels-last."""
        return suggest_memory_format(self.x) == torch.channels_last

    @property
    def is_pointwise(self) -> bool:
        """Whether its kernel is one pixel."""
        return math.prod(self.kernel) == 1

    @property
    def is_product(self) -> bool:
        """Whether it is a product of the image itself."""
        return self.is_pointwise and not self.is_strided and not any(self.padding)

    @property
    def is_bf16(self) -> bool:
        """Whether oneDNN has algorithms for this type, as it has with AVX-512."""
        return self.x.dtype == torch.bfloat16 and has_avx512()

    @property
    def is_tiled(self) -> bool:
        """Whether oneDNN multiplies tiles, which it reads from channels-last tensors."""
        return self.is_bf16 and supports("amx_bf16") and not self.is_depthwise

    @property
    def columns(self) -> int:
        """Bytes of im2col's matrix for one image."""
        inputs = self.weight[0].numel()
        return int(inputs * math.prod(self.y.shape[2:]) * self.x.element_size())

    @property
    def copied_columns(self) -> int:
        """As ``columns``, but 0 where the image itself is the matrix."""
        return 0 if self.is_product else self.columns

    @property
    def blocked_x(self) -> int:
        """Bytes of the input in blocks; 0 if it is read as it is."""
        return 0 if self.x.shape[1] <= _IMAGE_CHANNELS else blocked(self.x)

    @property
    def blocked_weight(self) -> int:
        """Bytes of the weight with its outputs and, within a group, its inputs in blocks."""
        outputs, inputs = in_blocks(self.outputs), in_blocks(self.inputs)
        if self.is_depthwise:
            outputs, inputs = 1, 1
        elif self.x.shape[1] <= _IMAGE_CHANNELS:
            inputs = self.inputs
        return self.weight_of(outputs, inputs)

    def weight_of(self, outputs: int, inputs: int) -> int:
        """Return the bytes of the weight, had a group so many outputs and inputs."""
        area = math.prod(self.kernel) * self.weight.element_size()
        return int(self.groups * outputs * inputs * area)

    @property
    def weight_copy(self) -> int:
        """Bytes of the weight brought to the layout of a channels-last input."""
        ready = self.weight.is_contiguous(memory_format=torch.channels_last)
        return self.weight.nbytes if self.is_channels_last and not ready else 0


def blocked(x: Tensor) -> int:
    """Return the bytes of x with its channels in whole blocks."""
    return int(x.nbytes // x.shape[1] * in_blocks(x.shape[1]))


def in_blocks(channels: int) -> int:
    """Return the channels, rounded up to whole vectors of the processor."""
    return round_up(channels, 16 if has_avx512() else 8)


def in_pairs(channels: int) -> int:
    """Return the channels, filled up to pairs of which tiles have whole rows."""
    return round_up(channels, PAIRS if channels > PAIRS else 2)


def ceil_div(number: int, divisor: int) -> int:
    """Return the quotient, rounded up."""
    return -(-number // divisor)


def round_up(number: int, step: int) -> int:
    """Return the next multiple of ``step``."""
    return ceil_div(number, step) * step


def has_avx512() -> bool:
    """Return whether PyTorch uses vectors of 512 bits."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def supports(instructions: str) -> bool:
    """Return whether the processor has ``instructions``."""
    return bool(torch.cpu.get_capabilities().get(instructions))

"""What convolutions allocate in bf16 is compared with what PyTorch's allocator recorded."""

from typing import Any

import pytest
import torch

from momconv.planner.convolution import has_avx512
from momconv.planner.measurement import measure
from momconv.planner.scratch import peak_within

aten = torch.ops.aten
CPU = torch.device("cpu")

# Channels, of a group, in and out; pixels of a side; side of the kernel; stride; groups.
SHAPES = [
    (16, 16, 32, 3, 1, 1),
    (64, 64, 8, 3, 1, 1),
    (64, 64, 28, 3, 1, 1),
    (1024, 256, 14, 1, 1, 1),
    (32, 64, 16, 3, 2, 1),
    (256, 512, 14, 1, 2, 1),
    (3, 64, 64, 7, 2, 1),  # an image
    (96, 192, 16, 2, 2, 1),  # without overlap
    (96, 96, 16, 7, 1, 96),
    (96, 96, 16, 3, 1, 96),
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.skipif(not has_avx512(), reason="without AVX-512 PyTorch has one algorithm for bf16")
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scratch_in_bf16_is_predicted(
    shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    inputs, outputs, side, kernel, stride, groups = shape
    x = torch.zeros(2, inputs, side, side).bfloat16().to(memory_format=layout)
    weight = torch.zeros(outputs, inputs // groups, kernel, kernel).bfloat16()
    padding = [kernel // 2 if kernel % 2 else 0] * 2
    rest = ([stride] * 2, padding, [1, 1], False, [0, 0], groups)
    y = compare(aten.convolution.default, x, weight, None, *rest)
    compare(aten.convolution_backward.default, y, x, weight, None, *rest, [True, False, False])
    compare(aten.convolution_backward.default, y, x, weight, None, *rest, [False, True, False])


def compare(func: Any, *args: Any) -> Any:
    kept: list[Any] = []
    measured = measure(lambda: kept.append(func(*args)), CPU)
    results = kept[0] if isinstance(kept[0], tuple) else kept
    tensors = [result for result in results if result is not None]
    assert peak_within(func, args, tensors) == pytest.approx(measured, rel=0.05)
    return tensors[0]

"""What convolutions allocate is compared with what PyTorch's allocator records for more images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from momconv.planner import convolution
from momconv.planner.convolution import peak_of_convolution
from momconv.planner.measurement import measure

aten = torch.ops.aten
CPU = torch.device("cpu")

# Channels, of all groups, in and out; pixels of a side; side of the kernel; stride; groups.
SHAPES = [
    (64, 64, 8, 3, 1, 1),
    (64, 64, 23, 3, 1, 1),
    (1024, 256, 7, 1, 1, 1),
    (32, 64, 17, 3, 2, 1),
    (256, 512, 14, 1, 2, 1),
    (3, 64, 64, 7, 2, 1),  # an image
    (96, 192, 16, 2, 2, 1),  # without overlap
    (96, 96, 16, 7, 1, 96),
    (48, 48, 24, 3, 1, 6),  # groups that fill no block
]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_more_images_need_is_known_from_few(
    shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> None:
    inputs, outputs, side, kernel, stride, groups = shape
    x = torch.zeros(17, inputs, side, side, dtype=dtype).to(memory_format=layout)
    weight = torch.zeros(outputs, inputs // groups, kernel, kernel, dtype=dtype)
    padding = [kernel // 2 if kernel % 2 else 0] * 2
    rest = ([stride] * 2, padding, [1, 1], False, [0, 0], groups)
    y = compare(aten.convolution.default, x, weight, None, *rest)
    compare(aten.convolution_backward.default, y, x, weight, None, *rest, [True, False, False])
    compare(aten.convolution_backward.default, y, x, weight, None, *rest, [False, True, False])


def compare(func: Any, *args: Any) -> Any:
    kept: list[Any] = []
    measured = measure(lambda: kept.append(func(*args)), CPU)
    predicted = peak_of_convolution(func, args)
    # What each thread needs for itself may change with the images, by about a copy of the weight.
    assert predicted == pytest.approx(measured, rel=0.02, abs=2**18)
    results = kept[0] if isinstance(kept[0], tuple) else kept
    return next(result for result in results if result is not None)


def test_other_convolutions_are_measured_alike() -> None:
    x = torch.zeros(9, 8, 40)
    compare(aten.convolution.default, x, torch.zeros(8, 8, 3), None, [1], [1], [1], False, [0], 1)
    x, weight = torch.zeros(9, 8, 10, 10), torch.zeros(8, 4, 2, 2)
    compare(aten.convolution.default, x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)


def test_each_is_measured_once_on_a_machine(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(5, 7, 11, 11), torch.zeros(7, 7, 3, 3)
    args = (x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    first = peak_of_convolution(aten.convolution.default, args)
    assert first >= 5 * 7 * 11 * 11 * 4
    assert len([*(cache / "convolutions").iterdir()]) >= 1
    convolution._recall.cache_clear()
    monkeypatch.setattr(convolution, "record", pytest.fail)
    assert peak_of_convolution(aten.convolution.default, args) == first

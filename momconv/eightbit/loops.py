"""The steps of optimizers.py as one loop each, which Numba compiles when it is first needed.

Nothing is defined here: for finite values the bits are those of ``compute`` and of Blocks. The
compiler fuses no product into a sum, as ``fastmath`` is off.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from momconv.eightbit.blocks import BLOCK, LEAST_SCALE, Blocks, borders, numbers
from momconv.machine_code import compiled

_SHARE = 2**8  # blocks; fewer are not worth another thread
_LEAST_SCALE = np.float32(LEAST_SCALE)

_threads = ThreadPoolExecutor(thread_name_prefix="momconv")


def run(
    name: str,
    values: Tensor,
    gradient: Tensor,
    states: Sequence[Blocks],
    constants: Sequence[float],
) -> None:
    """Change values and states in place, in a part for each thread."""
    loop, count = _LOOPS[name], len(states[0].scales)
    threads = max(1, torch.get_num_threads() // 2)  # PyTorch's own are still busy, see fused_cpu.py
    share = max(_SHARE, math.ceil(count / threads))
    singles = [np.float32(constant) for constant in constants]
    maps = [array for state in states for array in _find_maps(signed=state.signed)]

    def work(first: int) -> None:
        flat = slice(first * BLOCK, (first + share) * BLOCK)
        parts = [t[flat].numpy() for t in (values, gradient, *(state.codes for state in states))]
        scales = [state.scales[first : first + share].numpy() for state in states]
        loop(*parts, *scales, *maps, *singles)

    first, *others = range(0, count, share)
    futures = [_threads.submit(work, other) for other in others]
    work(first)
    for future in futures:
        future.result()


@cache
def _find_maps(*, signed: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers, the borders, and the byte of a float by its upper half.

    Floats that share their upper half lie closer together than borders do, so that byte or the
    next is the nearest.
    """
    # By NumPy, as PyTorch's allocator would count the tables to the step that needs them first.
    limits = borders(signed=signed).numpy()
    halves = np.arange(2**16, dtype=np.uint32) << 16
    ends = np.nan_to_num(np.stack([halves, halves | 0xFFFF]).view(np.float32))
    table = np.searchsorted(limits, ends, side="right").min(0).astype(np.uint8)
    padded = np.append(limits, np.float32(math.nan))  # there is none after the last
    return numbers(signed=signed).numpy(), padded, table


@compiled
def _read(kept, codes, scale, values):
    for i in range(kept.size):
        kept[i] = values[codes[i]] * scale


@compiled
def _write(kept, codes, scales, block, limits, table):
    """Several short loops, most of which the compiler does for many values at once."""
    largest = np.int32(0)  # the bits of a magnitude, whose order does not matter, unlike floats'
    for i in range(kept.size):
        largest = max(largest, np.float32(abs(kept[i])).view(np.int32))
    scale = max(np.int32(largest).view(np.float32), _LEAST_SCALE)
    scales[block] = scale
    for i in range(kept.size):
        kept[i] /= scale
    for i in range(kept.size):
        codes[i] = table[np.uint64(np.float32(kept[i]).view(np.uint32) >> np.uint32(16))]
    for i in range(kept.size):
        codes[i] += np.uint8(kept[i] >= limits[np.uint64(codes[i])])


@compiled
def _sgd(p, g, codes, scales, values, limits, table, rate, decay, momentum, looks_ahead):
    room = np.empty(BLOCK, np.float32)
    for block in range(scales.size):
        part = slice(block * BLOCK, min((block + 1) * BLOCK, p.size))
        parameter, gradients, bytes_ = p[part], g[part], codes[part]
        buffer = room[: parameter.size]
        _read(buffer, bytes_, scales[block], values)
        for i in range(parameter.size):
            gradient = parameter[i] * decay + gradients[i]
            buffer[i] = buffer[i] * momentum + gradient
            change = buffer[i] * momentum + gradient if looks_ahead else buffer[i]
            parameter[i] -= change * rate
        _write(buffer, bytes_, scales, block, limits, table)


@compiled
def _adamw(
    p, g, mean_codes, square_codes, mean_scales, square_scales,
    mean_values, mean_limits, mean_table, square_values, square_limits, square_table,
    decay, fresh, kept, fresh_square, root, eps, rate,
):  # fmt: skip
    room, square_room = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    for block in range(mean_scales.size):
        part = slice(block * BLOCK, min((block + 1) * BLOCK, p.size))
        parameter, gradients = p[part], g[part]
        mean, square = room[: parameter.size], square_room[: parameter.size]
        _read(mean, mean_codes[part], mean_scales[block], mean_values)
        _read(square, square_codes[part], square_scales[block], square_values)
        for i in range(parameter.size):
            mean[i] += (gradients[i] - mean[i]) * fresh
            square[i] = square[i] * kept + gradients[i] * gradients[i] * fresh_square
            change = mean[i] / (np.sqrt(square[i]) * root + eps)
            parameter[i] = parameter[i] * decay - change * rate
        _write(mean, mean_codes[part], mean_scales, block, mean_limits, mean_table)
        _write(square, square_codes[part], square_scales, block, square_limits, square_table)


_LOOPS: dict[str, Any] = {"sgd": _sgd, "adamw": _adamw}

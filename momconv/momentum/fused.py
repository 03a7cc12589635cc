"""The steps of kernels.py as one operation each, which passes over memory once.

They are operations of PyTorch's, so that the planner sees them too: on fake tensors they give what
they allocate and compute nothing. A GPU's need Triton, a CPU's Numba.
"""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def are_for(x: Tensor, y: Tensor) -> bool:
    """Whether there are such operations for x and y = block(x) on their device."""
    if x.is_cuda:
        return x.dtype == torch.float32 and _is_installed("triton")
    return x.is_cpu and y.dtype in (x.dtype, torch.bfloat16) and _is_installed("numba")


@torch.library.custom_op("momconv::advance", mutates_args=("v", "r"), device_types="cpu")
def advance(
    x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float, ulp: float
) -> Tensor:
    """As ``kernels.advance``; the residual is multiplied by ``scale`` and counted in ulps."""
    from momconv.momentum import fused_cpu

    return fused_cpu.advance(x, v, r, y, scale, gamma, ulp)


@torch.library.custom_op("momconv::undo", mutates_args=("v", "r"), device_types="cpu")
def undo(x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float) -> None:
    """As ``kernels.undo``."""
    from momconv.momentum import fused_cpu

    fused_cpu.undo(x, v, r, y, scale, gamma)


@advance.register_kernel("cuda")
def _advance_on_gpu(
    x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float, ulp: float
) -> Tensor:
    from momconv.momentum import fused_gpu

    return fused_gpu.advance(x, v, r, y, scale, gamma, ulp)


@undo.register_kernel("cuda")
def _undo_on_gpu(
    x: Tensor, v: Tensor, r: Tensor | None, y: Tensor, scale: float, gamma: float
) -> None:
    from momconv.momentum import fused_gpu

    fused_gpu.undo(x, v, r, y, scale, gamma)


@advance.register_fake
def _allocate(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None

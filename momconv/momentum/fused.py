"""The steps of kernels.py as one operation each, which passes over memory once.

They are operations of PyTorch's, so that the planner sees them too: on fake tensors they give what
they allocate and compute nothing. A GPU's need Triton, a CPU's Numba. They have no gradients.
"""

from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("momconv", "DEF")
_state = "Tensor x, Tensor(a!) v, Tensor(b!)? r, Tensor y"
_constants = "float scale, float gamma"
_library.define(f"advance({_state}, Tensor(c!) largest, {_constants}, float ulp) -> Tensor")
_library.define(f"undo({_state}, {_constants}) -> ()")

# As ``kernels.advance`` and ``kernels.undo``; the residual is multiplied by ``scale`` and then
# counted in ulps.
advance = torch.ops.momconv.advance.default
undo = torch.ops.momconv.undo.default


def are_for(x: Tensor, y: Tensor) -> bool:
    """Whether there are such operations for x and y = block(x) on their device."""
    if x.is_cuda:
        return x.dtype == torch.float32 and _is_installed("triton")
    return x.is_cpu and y.dtype in (x.dtype, torch.bfloat16) and _is_installed("numba")


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _find(module: str, name: str) -> Any:
    """A function of ``module``, which is imported when it is first used."""
    return getattr(import_module(f"momconv.momentum.{module}"), name)


def _call(module: str, name: str, *args: Any) -> Any:
    return _find(module, name)(*args)


for _name in ("advance", "undo"):
    _library.impl(_name, partial(_call, "fused_cpu", _name), "CPU")
    _library.impl(_name, partial(_call, "fused_gpu", _name), "CUDA")
_library.impl("advance", lambda x, *_: torch.empty_like(x), "Meta")
_library.impl("undo", lambda *_: None, "Meta")

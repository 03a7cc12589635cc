"""The steps of kernels.py as one operation each, which passes over memory once.

They are operations of PyTorch's, so that the planner sees them too: on fake tensors they give what
they allocate and compute nothing. A GPU's need Triton and all that Triton needs to build them, a
CPU's Numba. They have no gradients.
"""

import warnings
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from momconv.exhaustion import is_exhaustion
from momconv.momentum.measures import no_magnitudes

_library = torch.library.Library("momconv", "DEF")
_library.define(
    "advance(Tensor x, Tensor(a!)? low, Tensor(b!) v, Tensor(c!)? r, Tensor y, Tensor(d!) largest,"
    " float scale, float gamma, float ulp, float ratio) -> Tensor"
)
_library.define("retreat(Tensor x, Tensor(a!)? low, Tensor v, float ulp, float ratio) -> Tensor")
_library.define(
    "undo(Tensor x, Tensor(a!) v, Tensor(b!)? r, Tensor y, float scale, float gamma) -> ()"
)

# As those of kernels.py. The residual is multiplied by ``scale`` and then counted in v_ulps;
# ``ratio`` is v_ulp/ulp.
advance = torch.ops.momconv.advance.default
retreat = torch.ops.momconv.retreat.default
undo = torch.ops.momconv.undo.default

_OLDEST = (7, 0)  # as torch.compile has it
NEEDED = "a GPU that Triton knows, gcc and Python's headers (apt-get install gcc python3-dev)"


def are_for(x: Tensor, y: Tensor) -> bool:
    """Return whether there are such operations for x and y = block(x) on their device."""
    if x.is_cuda:
        return x.dtype == torch.float32 and find_obstacle(x.device) is None
    return x.is_cpu and y.dtype in (x.dtype, torch.bfloat16) and _is_installed("numba")


@cache
def find_obstacle(gpu: torch.device) -> str | None:
    """Return why there are none on ``gpu``, where they are tried once; None if they work.

    Warns of a Triton that is installed in vain. Of a GPU that is not there the best is assumed.
    """
    if not _is_installed("triton"):
        return "Triton is not installed"
    if not torch.cuda.is_available():
        return None
    try:
        _require_capable(gpu)
        with _disable_current_modes():  # who asks may be computing with fakes
            _try_out(gpu)
    except Exception as error:  # Triton's, of its parts, of the compiler that it calls
        if is_exhaustion(error):
            raise
        obstacle = f"{type(error).__name__}: {' '.join(str(error).split())}"
        warnings.warn(
            f"momentum steps on {gpu} pass over memory several times instead of once: Triton "
            f"builds no kernels for it ({obstacle}); fix: {NEEDED}",
            stacklevel=2,
        )
        return obstacle
    return None


def _require_capable(gpu: torch.device) -> None:
    """Do nothing if Triton knows such GPUs; what it tries for older ones may end the process.

    Raises:
        RuntimeError: It does not.
    """
    if (capability := torch.cuda.get_device_capability(gpu)) < _OLDEST:
        raise RuntimeError(f"compute capability {capability} is below {_OLDEST}")


def _try_out(gpu: torch.device) -> None:
    """Take a step of a few elements there and back.

    Raises:
        Exception: Any, if it cannot be done.
    """
    x, y = torch.zeros(2, 8, device=gpu)
    low, v = torch.zeros_like(x, dtype=torch.int8), torch.zeros_like(x, dtype=torch.int32)
    advance(x, low, v, None, y, no_magnitudes(x), 1.0, 1.0, 1.0, 1.0)
    retreat(x, low, v, 1.0, 1.0)
    undo(x, v, None, y, 1.0, 1.0)
    torch.cuda.synchronize(gpu)


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _find(module: str, name: str) -> Any:
    """Return a function of ``module``, which is imported when it is first used."""
    return getattr(import_module(f"momconv.momentum.faster.{module}"), name)


def _call(module: str, name: str, *args: Any) -> Any:
    return _find(module, name)(*args)


for _name in ("advance", "retreat", "undo"):
    _library.impl(_name, partial(_call, "fused_cpu", _name), "CPU")
    _library.impl(_name, partial(_call, "fused_gpu", _name), "CUDA")
_library.impl("advance", lambda x, *_: torch.empty_like(x), "Meta")
_library.impl("retreat", lambda x, *_: torch.empty_like(x), "Meta")
_library.impl("undo", lambda *_: None, "Meta")

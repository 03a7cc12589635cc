"""What PyTorch does otherwise on a GPU, for a step that is traced on a CPU because none is there.

Autograd itself wants the GPU, on fakes too. So the trace runs on a fake CPU, and what decides about
memory there is made as on CUDA: autocast computes more functions in single precision, and dropout
keeps a mask of one byte an element. The lists are PyTorch's:
https://docs.pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# Under each name that it can be called by. What CPUs' autocast widens as well is not here.
_IN_FP32: frozenset[Callable[..., Any]] = frozenset(
    function
    for place in (torch, Tensor, F)
    for name in (
        *("layer_norm", "native_layer_norm", "group_norm", "softmax", "log_softmax", "softmin"),
        *("exp", "expm1", "log", "log10", "log2", "log1p", "pow", "__pow__", "reciprocal", "rsqrt"),
        *("softplus", "sum", "prod", "cumsum", "cumprod", "norm", "dist", "cdist", "renorm"),
        *("logsumexp", "cosine_similarity", "normalize", "cross_entropy", "nll_loss", "kl_div"),
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"),
        *("binary_cross_entropy_with_logits", "multi_margin_loss", "multilabel_margin_loss"),
    )
    if (function := getattr(place, name, None)) is not None
)


class AsOnGpu(TorchFunctionMode):
    """Inside, what is called on a CPU has the types and the memory that it has on a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            func = _dropout
        if func in _IN_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _widen, (args, kwargs))
        return func(*args, **kwargs)


def _widen(tensor: Tensor) -> Tensor:
    """Return half precision widened to single precision."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,  # noqa: FBT001 (the arguments are F.dropout's)
    inplace: bool = False,  # noqa: FBT001
) -> Tensor:
    if inplace or not (training and 0 < p < 1):
        return F.dropout(input, p, training, inplace)
    return torch.native_dropout(input, p, training)[0]

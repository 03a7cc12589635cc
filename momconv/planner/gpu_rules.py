"""What PyTorch does otherwise on a GPU, for a step that is traced on a CPU because none is there.

Autograd itself wants the GPU, on fakes too. So the trace runs on a fake CPU, and what decides about
memory there is replaced, below all that calls it, by what CUDA has: the precision that autocast
chooses for each function, dropout that keeps a mask of one byte an element, and attention that
needs no matrix of its weights for dropout. Which functions autocast knows, PyTorch says itself; the
lists here are of PyTorch's ATen/autocast_mode.h.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import RLock
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves, tree_map_only

# Those that narrow on both are the same; all others that CUDA knows narrow their arguments.
_IN_FP32 = {
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "sinh"),
    *("reciprocal", "rsqrt", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar"),
    *(
        "softplus",
        "layer_norm",
        "native_layer_norm",
        "rms_norm",
        "group_norm",
        "frobenius_norm.dim",
    ),
    *("nuclear_norm", "nuclear_norm.dim", "norm.Scalar", "norm.ScalarOpt_dim", "cosine_similarity"),
    *("poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "kl_div", "l1_loss"),
    *("hinge_embedding_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss"),
    *("multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss"),
    *(
        "binary_cross_entropy_with_logits",
        "dist",
        "pdist",
        "cdist",
        "renorm",
        "logsumexp",
        "cosine_similarity",
    ),
    *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_trilinear3d"),
    *("upsample_bicubic2d", "_upsample_bicubic2d_aa"),
}
_TO_FP32 = {  # reads what is narrow, and adds it up in single precision
    *("prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum"),
    *("sum.dim_IntList", "linalg_vector_norm", "linalg_matrix_norm", "linalg_matrix_norm.str_ord"),
}
_IN_WIDEST = {
    *("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler"),
    *("index_put", "tensordot", "scatter_add"),
}
_FUSED = {"softmax.int": torch.ops.aten._softmax, "log_softmax.int": torch.ops.aten._log_softmax}
_DROPOUT = 4  # its place among the arguments of attention
_AUTOCAST = "AutocastCPU"
_lock = RLock()  # what is replaced is so for all threads


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, what is called on a CPU has the types and the memory that it has on a GPU."""
    cpu, cuda = map(_list_known, (_AUTOCAST, "AutocastCUDA"))
    with _lock, torch.library._scoped_library("aten", "IMPL") as library:
        for name in cuda & (_IN_FP32 | _TO_FP32 | _IN_WIDEST) | cuda - cpu:
            library.impl(name, partial(_cast, _find(name), _choose_rule(name)), _AUTOCAST)
        for name in cpu - cuda:
            if not name.startswith("conv"):  # CUDA knows what these call
                library.impl(name, torch.library.fallthrough_kernel, _AUTOCAST)
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attend, "AutogradCPU")
        yield


def _list_known(key: str) -> set[str]:
    """Return the names of the functions that have a kernel of their own there."""
    names = torch._C._dispatch_get_registrations_for_dispatch_key(key)
    return {name.removeprefix("aten::") for name in names if name.startswith("aten::")}


def _find(name: str) -> OpOverload:
    packet, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return found


Rule = Callable[..., Any]


def _choose_rule(name: str) -> Rule:
    if name in _TO_FP32:
        return partial(_to_fp32, fused=_FUSED.get(name))
    if name in _IN_FP32:
        return _in_fp32
    return _in_widest if name in _IN_WIDEST else _in_half


def _cast(func: OpOverload, rule: Rule, *args: Any, **kwargs: Any) -> Any:
    half = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", enabled=False):
        return rule(func, half, args, kwargs)


def _in_half(func: OpOverload, half: torch.dtype, args: Any, kwargs: Any) -> Any:
    args, kwargs = _convert((args, kwargs), half)
    return func(*args, **kwargs)


def _in_fp32(func: OpOverload, _half: torch.dtype, args: Any, kwargs: Any) -> Any:
    args, kwargs = _convert((args, kwargs), torch.float32)
    return func(*args, **kwargs)


def _in_widest(func: OpOverload, half: torch.dtype, args: Any, kwargs: Any) -> Any:
    is_wide = any(leaf.dtype == torch.float32 for leaf in _list_castable((args, kwargs)))
    args, kwargs = _convert((args, kwargs), torch.float32 if is_wide else half)
    return func(*args, **kwargs)


def _to_fp32(
    func: OpOverload, _half: torch.dtype, args: Any, kwargs: Any, *, fused: Any = None
) -> Any:
    has_type = any(isinstance(value, torch.dtype) for value in (*args, *kwargs.values()))
    if has_type or not _list_castable(args[:1]):
        return func(*args, **kwargs)
    if fused and args[0].dtype == torch.float16:
        return fused(args[0], args[1], half_to_float=True)
    return func(*args, **kwargs | {"dtype": torch.float32})


def _convert(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(dtype) if _list_castable(t) else t, values)


def _list_castable(values: Any) -> list[Tensor]:
    """Return the tensors that autocast may cast: not those in double precision."""
    leaves = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.dtype != torch.float64]


def _dropout(input: Tensor, p: float, train: bool) -> Tensor:  # noqa: FBT001 (as PyTorch's)
    if train and 0 < p < 1:
        return torch.native_dropout(input, p, train)[0]
    made: Tensor = torch.ops.aten.dropout.default.decompose(input, p, train)
    return made


def _attend(*args: Any, **options: Any) -> Tensor:
    """Return attention without dropout, for which the kernels of a GPU need no memory."""
    args = tuple(0.0 if place == _DROPOUT else arg for place, arg in enumerate(args))
    made: Tensor = torch.ops.aten.scaled_dot_product_attention.default.decompose(*args, **options)
    return made

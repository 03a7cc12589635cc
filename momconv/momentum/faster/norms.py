"""BatchNorm in a block that runs twice: the second run knows the statistics of the batch.

On a CPU most of BatchNorm's time goes into the mean and variance of each channel. They are few
numbers, so the first run keeps them and the second normalises with them, as evaluation does: with a
variance of 1, and weight/√(variance + ε) as the weight. PyTorch then multiplies that by 1, and so
gets the same bits. The graph is the first run's, gradients of the statistics included, and so are
the running statistics.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import NotReproducible

_LAYOUTS = ((4, torch.channels_last), (5, torch.channels_last_3d))

Forward = Callable[[Any, Tensor], Tensor]

_this_thread = threading.local()  # call: what takes the place of the norms' forward


class Norms:
    """The BatchNorms of a block, with the statistics of all their calls in its first run.

    Attributes:
        others: The block's modules that need their buffers when they are repeated.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        is_compiled = any(map(_is_compiled, modules))  # both runs must be the same program
        norms = [] if is_compiled else [module for module in modules if _is_known(module)]
        found = {*norms}
        self.others: Sequence[nn.Module] = [module for module in modules if module not in found]
        self._all: Sequence[nn.Module] = norms
        # For each call: the norm, the mean of each channel, 1/√(variance + ε) of each channel; None
        # where they are not known.
        self._calls: list[Any] = []
        self._is_computing = False

    def finish(self) -> list[nn.Module]:
        """Return, after the first run, the norms that do not know the statistics of all calls."""
        norms, self._all, self.others = self._all, (), ()
        called, means = self._calls[::3], self._calls[1::3]
        unknown = {norm for norm, mean in zip(called, means, strict=True) if mean is None}
        known = {*called} - unknown
        return [norm for norm in norms if norm not in known]

    def own(self, tensor: Tensor) -> bool:
        """Return whether a norm saves this for backward, and does without it in its second run."""
        return self._is_computing and tensor.dim() == 1

    def remembering(self) -> AbstractContextManager[None]:
        """Inside, each norm keeps the statistics of its batches."""
        return _calling(self._all, self._remember)

    def recalling(self) -> AbstractContextManager[None]:
        """Inside, each norm takes these statistics, in the same order."""
        return _calling(self._calls[::3], partial(self._recall, iter(self._calls)))

    def _remember(self, norm: Any, x: Tensor) -> Tensor:
        norm._check_input_dim(x)
        channels = norm.num_features
        is_valid = x.shape[1] == channels and x.numel() > channels
        if not (is_valid and norm.training and _is_dense(x)):
            self._calls += norm, None, None
            return _own_forward(norm, x)  # or its error
        norm.num_batches_tracked.add_(1)
        y, mean, scale = self._compute(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            True,
            norm.momentum,
            norm.eps,
        )
        self._calls += norm, mean, scale
        return y

    def _recall(self, calls: Iterator[Any], norm: Any, x: Tensor) -> Tensor:
        is_expected = next(calls, None) is norm
        if not is_expected:
            raise NotReproducible(
                f"a block called its {norm._get_name()} layers in another order when it was run"
                " again",
                kind="inversion.not_reproducible",
                fix='momconv.set_strategy(model, "store")',
            )
        mean, scale = next(calls), next(calls)
        if mean is None:
            return _own_forward(norm, x)
        weight = (norm.weight.detach() * scale).requires_grad_(norm.weight.requires_grad)
        variance = torch.ones_like(mean)
        return self._compute(x, weight, norm.bias, mean, variance, False, 0.0, 0.0)[0]

    def _compute(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self._is_computing = True
        try:
            return torch.native_batch_norm(*args)
        finally:
            self._is_computing = False


def _is_known(module: nn.Module) -> bool:
    """Return whether the norm is PyTorch's own, in training on a CPU, with all it can have."""
    return (
        isinstance(module, _BatchNorm)
        and type(module).forward is _BatchNorm.forward
        and module.training
        and module.affine
        and module.track_running_stats
        and module.momentum is not None
        and module.eps > 0
        and module.weight.device.type == "cpu"
        and module.weight.dtype in (torch.float32, torch.float64)
        and module.weight.is_contiguous()
    )


def _is_dense(x: Tensor) -> bool:
    """Return whether PyTorch computes weight · scale first, as it does without gaps in memory."""
    return x.is_contiguous() or any(
        x.dim() == dim and x.is_contiguous(memory_format=layout) for dim, layout in _LAYOUTS
    )


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


@contextmanager
def _calling(norms: Iterable[nn.Module], call: Forward) -> Iterator[None]:
    """Let norms do ``call`` in the place of their forward; other threads find them as they are."""
    before = getattr(_this_thread, "call", None)
    names = {norm: vars(norm) for norm in norms if "forward" not in vars(norm)}
    for norm, own in names.items():
        own["forward"] = MethodType(_forward, norm)
    _this_thread.call = call
    try:
        yield
    finally:
        _this_thread.call = before
        for own in names.values():
            own.pop("forward", None)


def _forward(norm: nn.Module, x: Tensor) -> Tensor:
    call: Forward | None = getattr(_this_thread, "call", None)
    if torch.compiler.is_compiling() or call is None:
        return _own_forward(norm, x)
    return call(norm, x)


def _own_forward(norm: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = type(norm).forward(norm, x)
    return y

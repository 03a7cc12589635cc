"""Running a block twice: once forgetting what backward needs, once, during backward, keeping it.

Whatever must be the same both times is arranged here: parameters, buffers (the second run works on
copies, so BatchNorm's statistics are updated once), random numbers, autocast, and which inputs
require gradients.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call

from momconv.errors import InversionError, NotReproducible, UsageError


class Replay:
    """One call of a block that is going to be repeated.

    The graph that the first call leaves is the ordinary one, except that its saved tensors are
    numbers. Backward finds the tensors under these numbers once :meth:`repeat` has been called.
    """

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        # By name and identity: torch.func.functional_call may have put other tensors in place.
        self._parameters = dict(block.named_parameters())
        self._saved: dict[int, Tensor] = {}
        self._dropped = 0

    def first(self, x: Tensor, *args: Tensor) -> Tensor:
        """block(x, *args), dropping what it saves for backward."""
        self._requires_grad = [tensor.requires_grad for tensor in (x, *args)]
        self._args = [arg.detach() for arg in args]
        self._autocast = autocast_settings(x.device.type)
        random_state = _random_state(x.device)
        with saved_tensors_hooks(self._drop, self._serve):
            y = evaluate(self._block, x, *args)
        # Only a block that drew numbers needs the state again: 5 KB a block add up.
        drew = not all(map(torch.equal, random_state, _random_state(x.device)))
        self._random_state = random_state if drew else []
        return y

    def repeat(self, x: Tensor) -> Tensor:
        """The same call once more, keeping what it saves; x must equal the first one.

        Raises:
            NotReproducible: the block saved more or fewer tensors than the first time.
        """
        buffers = {name: buffer.clone() for name, buffer in self._block.named_buffers()}
        inputs = [tensor.detach() for tensor in (x, *self._args)]
        for tensor, requires_grad in zip(inputs, self._requires_grad, strict=True):
            tensor.requires_grad_(requires_grad)
        self._saved = {}
        with (
            torch.enable_grad(),
            torch.autocast(**self._autocast),
            _random_numbers(self._random_state, x.device),
            saved_tensors_hooks(self._keep, self._serve),
        ):
            y: Tensor = functional_call(self._block, {**self._parameters, **buffers}, tuple(inputs))
        if len(self._saved) != self._dropped:
            raise NotReproducible(
                f"a {type(self._block).__name__} saved {self._dropped} tensors for backward the"
                f" first time and {len(self._saved)} when it was run again",
                kind="inversion.not_reproducible",
                fix='momconv.set_strategy(model, "store")',
            )
        return y.detach()

    def _drop(self, tensor: Tensor) -> int:
        self._dropped += 1
        return self._dropped - 1

    def _keep(self, tensor: Tensor) -> int:
        self._saved[len(self._saved)] = tensor.detach()
        return len(self._saved) - 1

    def _serve(self, number: int) -> Tensor:
        """Hand a tensor over, so that it is freed as soon as backward is done with it."""
        if number not in self._saved:
            raise InversionError(
                f"backward asked again for a tensor of a {type(self._block).__name__} that is"
                " recomputed once",
                kind="inversion.second_backward",
                fix='momconv.set_strategy(model, "store"), or call backward once per forward',
            )
        return self._saved.pop(number)


def evaluate(block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    """block(x, *args), which must leave x alone: x is needed again.

    Raises:
        UsageError: the block wrote into x.
    """
    version = x._version
    y: Tensor = block(x, *args)
    if x._version != version:
        raise UsageError(
            f"a {type(block).__name__} modifies its input in place",
            kind="model.modifies_input",
            fix="inplace=False in the first operation of the block",
        )
    return y


class _Before(torch.autograd.Function):
    """The identity, which calls ``action`` in backward before the gradient passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, action: Callable[..., object], *kept: Tensor) -> Tensor:
        ctx.action = action
        ctx.save_for_backward(*kept)  # so that autograd lets go of them when it is done
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.action(*ctx.saved_tensors)
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def before_backward(y: Tensor, action: Callable[..., object], *kept: Tensor) -> Tensor:
    """Y, such that backward calls ``action(*kept)`` before it enters the graph that made y.

    A node of its own, so that nothing of the previous node's work is alive during the action.
    """
    return _Before.apply(y, action, *kept) if y.requires_grad else y


def checkpoint(block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    """block(x, *args), keeping only x and args, and computing the block again in backward."""
    if not torch.is_grad_enabled():
        return evaluate(block, x, *args)
    replay = Replay(block)
    return before_backward(replay.first(x, *args), replay.repeat, x.detach())


def autocast_settings(device_type: str) -> dict[str, Any]:
    """Arguments with which torch.autocast does what it is doing now."""
    return {
        "device_type": device_type,
        "enabled": torch.is_autocast_enabled(device_type),
        "dtype": torch.get_autocast_dtype(device_type),
        "cache_enabled": torch.is_autocast_cache_enabled(),
    }


def _random_state(device: torch.device) -> list[Tensor]:
    """The state of the CPU's generator and of the device's own."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


@contextmanager
def _random_numbers(states: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draw the numbers that follow ``states`` (none: do not touch the generators)."""
    if not states:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(states[1], device)
        yield

"""Gradients that are used within the backward pass, and freed one after the other.

A parameter changes as soon as its gradient is complete. Nothing that is still to be computed in the
pass needs it by then: autograd completes a gradient when it has been through all uses, and before
it enters a block that is computed again or inverted, that has been done.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from momconv.training.processes import Processes

_Change = Callable[[Tensor], None]


def release_gradients(optimizer: Optimizer) -> ExitStack:
    """Let backward passes take the steps of ``optimizer``, and free each gradient once it is used.

    A parameter changes, by the optimiser's own step, as soon as its gradient is complete. So the
    whole batch has to go through the network at once, no norm of all gradients is known in time,
    and ``optimizer.step()`` is not to be called. Where a pass fails, some parameters may have
    changed already.

    Args:
        optimizer: One that changes each parameter by its own gradient and state, as those of
            PyTorch and momconv do but for LBFGS. Those that require a gradient now are changed.

    Returns:
        What is closed to end this, or is the context of a ``with`` block.

    >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> with release_gradients(torch.optim.SGD([weight], lr=0.5)):
    ...     weight.sum().backward()
    >>> weight.tolist(), weight.grad
    ([0.5, 1.5], None)
    """
    return _hook(optimizer, lambda change, parameter: change(parameter))


@contextmanager
def changing_in_backward(optimizer: Optimizer, processes: Processes) -> Iterator[list[Tensor]]:
    """Take steps as ``release_gradients``, by gradients that are summed over the processes.

    A sum goes on while the next gradient is computed. Afterwards the list has the norm of each.
    """
    norms: list[Tensor] = []
    waiting: deque[tuple[_Change, Tensor, Callable[[], None]]] = deque()

    def finish() -> None:
        change, parameter, wait = waiting.popleft()
        wait()
        assert parameter.grad is not None
        norms.append(torch.linalg.vector_norm(parameter.grad))
        change(parameter)

    def take(change: _Change, parameter: Tensor) -> None:
        assert parameter.grad is not None
        waiting.append((change, parameter, processes.begin_adding(parameter.grad)))
        if processes.count == 1 or len(waiting) > 1:
            finish()

    with _hook(optimizer, take):
        yield norms
        while waiting:
            finish()


def _hook(optimizer: Optimizer, take: Callable[[_Change, Tensor], None]) -> ExitStack:
    """Let ``take`` hear of new gradients and of what uses them, until the returned stack ends."""
    hooks = ExitStack()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                work = partial(take, partial(_change, optimizer, group))
                hooks.callback(parameter.register_post_accumulate_grad_hook(work).remove)
    return hooks


def _change(optimizer: Optimizer, group: dict[str, Any], parameter: Tensor) -> None:
    """Take the step of one parameter, and free its gradient."""
    groups = optimizer.param_groups
    optimizer.param_groups = [group | {"params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None

"""What becomes of gradients as soon as backward has completed them, one after the other.

Either they are summed over the processes while backward goes on, in a few flat pieces. A piece is
sent once all of its gradients are complete, in the last backward pass of a step, and after the
pieces before it, so that all processes send the same ones in the same order. A process that meets a
fault, before, in or after that pass, sends what is left of them as they are: the others neither
wait for it nor use the sums, as all learn of the fault next, and do the step again. PyTorch's
DistributedDataParallel would need every process to run backward, and equally often. The pieces are
all the memory that gradients take: each gradient is a view.

Or they are used and freed: a parameter changes as soon as its gradient is complete. Nothing that is
still to be computed in the pass needs it by then: autograd completes a gradient when it has been
through all uses, and before it enters a block that is computed again or inverted, that has been
done.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from momconv.errors import UsageError
from momconv.training.processes import Processes

_BYTES = 25 * 2**20  # of a piece, or one gradient

_Change = Callable[[Tensor], None]


class Buckets:
    """The gradients of a network, in the order in which backward is likely to complete them."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._buckets: list[_Bucket] = []
        self._parameters: list[nn.Parameter] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._touched: set[nn.Parameter] = set()  # that have a gradient of this process
        self._passes = 0  # that are left in this step
        self._waiting: list[Callable[[], None]] | None = None  # for the sums, in a step

    def prepare(self, model: nn.Module) -> None:
        """Reserve memory for the gradients of what learns in ``model`` now."""
        parameters = [p for p in model.parameters() if p.requires_grad][::-1]
        if list(map(id, parameters)) != list(map(id, self._parameters)):
            self.clear()
            self._lay_out(parameters)

    def clear(self) -> None:
        """Release the memory."""
        for hook in self._hooks:
            hook.remove()
        self._buckets, self._hooks, self._parameters = [], [], []

    def begin(self, model: nn.Module, passes: int) -> None:
        """Begin a step of so many backward passes in this process, with gradients of 0."""
        self.prepare(model)
        for bucket in self._buckets:
            bucket.reset()
        self._touched.clear()
        self._passes, self._waiting = passes, []

    def end_pass(self) -> None:
        """Count a backward pass."""
        self._passes -= 1

    def finish(self) -> None:
        """Sum the pieces that have not been summed. A gradient that no process has is none.

        Raises:
            ResourceError: A process is gone.
        """
        if self._waiting is None:
            return
        while len(self._waiting) < len(self._buckets):
            self._send()
        waiting, self._waiting = self._waiting, None
        for wait in waiting:
            wait()
        somewhere = self._processes.largest(*(p in self._touched for p in self._parameters))
        for parameter, has_gradient in zip(self._parameters, somewhere, strict=True):
            if not has_gradient:
                parameter.grad = None

    def _lay_out(self, parameters: list[nn.Parameter]) -> None:
        self._parameters = parameters
        group: list[nn.Parameter] = []
        for parameter, after in zip(parameters, [*parameters[1:], None], strict=True):
            group.append(parameter)
            size = sum(p.nbytes for p in group)
            if after is None or size + after.nbytes > _BYTES or after.dtype != parameter.dtype:
                bucket = _Bucket(group)
                hear = partial(self._hear, bucket)
                self._hooks += [p.register_post_accumulate_grad_hook(hear) for p in group]
                self._buckets.append(bucket)
                group = []

    def _hear(self, bucket: "_Bucket", parameter: nn.Parameter) -> None:
        """Take notice of a gradient that a pass has completed; in the last, send whole pieces."""
        self._touched.add(parameter)
        if self._waiting is None or self._passes != 1:
            return
        bucket.missing.discard(parameter)
        while len(self._waiting) < len(self._buckets):
            if self._buckets[len(self._waiting)].missing:
                return
            self._send()

    def _send(self) -> None:
        assert self._waiting is not None
        bucket = self._buckets[len(self._waiting)]
        self._waiting.append(self._processes.begin_adding(bucket.values))


class _Bucket:
    """Some gradients, which are views of one tensor."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        first = parameters[0]
        self._parameters = parameters
        count = sum(parameter.numel() for parameter in parameters)
        self.values = torch.zeros(count, dtype=first.dtype, device=first.device)
        self.missing: set[nn.Parameter] = set()

    def reset(self) -> None:
        """Set all gradients to 0, and take them for incomplete."""
        self.values.zero_()
        self.missing = {*self._parameters}
        parts: list[Tensor] = [*self.values.split([p.numel() for p in self._parameters])]
        for parameter, part in zip(self._parameters, parts, strict=True):
            parameter.grad = part.as_strided(
                parameter.shape, parameter.stride(), part.storage_offset()
            )


def release_gradients(optimizer: Optimizer) -> ExitStack:
    """Let backward passes take the steps of ``optimizer``, and free each gradient once it is used.

    A parameter changes, by the optimiser's own step, as soon as its gradient is complete. So the
    whole batch has to go through the network at once, no norm of all gradients is known in time,
    and ``optimizer.step()`` is not to be called. Where a pass fails, some parameters may have
    changed already.

    Args:
        optimizer: One that changes each parameter by its own gradient and state, as those of
            PyTorch and momconv do but for LBFGS. Those that require a gradient now are changed.

    Raises:
        UsageError: It is LBFGS.

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
    if isinstance(optimizer, LBFGS):
        raise UsageError(
            "LBFGS takes all gradients at once, so none can be released before",
            kind="usage.bad_value",
            fix="release_gradients(torch.optim.AdamW(model.parameters()))",
        )
    for number, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if parameter.requires_grad:
                work = partial(take, partial(_change, optimizer, number))
                hooks.callback(parameter.register_post_accumulate_grad_hook(work).remove)
    return hooks


def _change(optimizer: Optimizer, number: int, parameter: Tensor) -> None:
    """Take the step of one parameter of the group of this number, and free its gradient."""
    groups = optimizer.param_groups  # others, once a state was loaded
    optimizer.param_groups = [groups[number] | {"params": [parameter]}]
    try:
        optimizer.step()
    finally:
        optimizer.param_groups = groups
    parameter.grad = None

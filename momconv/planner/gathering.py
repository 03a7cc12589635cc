"""What weights that are divided among processes take while a step has them together.

It follows PyTorch's FSDP2 (torch/distributed/fsdp/_fully_shard), with the hooks that it has, in the
forward pass, in what is run again in backward, and in backward:

* A block's weights arrive in one piece, and are copied to where each lies. In the forward pass that
  piece lives until the next one has arrived, and in backward it arrives a block ahead.
* They are given up after the forward pass of the block, and again after its backward pass; where a
  block runs again in backward, they stay for that.
* Then its gradients are copied into one piece, of which the process keeps its part of the sum. The
  piece lives until the next one is made. gloo adds up in a copy of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from momconv.planner.measurement import shard_bytes

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
Release = Callable[[], None]
Hold = Callable[[int], Release]  # takes so many bytes, and returns what gives them back


def find_units(model: nn.Module) -> list[nn.Module]:
    """Return the blocks whose weights come together at once; the rest of ``model`` is one more.

    Those are the composite members of sequences, but of a sequence of such sequences theirs.
    """
    units: list[nn.Module] = []
    for child in model.children():
        is_block = isinstance(model, _CONTAINERS) and not _has_blocks(child)
        if not is_block:
            units += find_units(child)
        elif next(child.children(), None) is not None and any(True for _ in child.parameters()):
            units.append(child)
    return units


def _has_blocks(module: nn.Module) -> bool:
    children = list(module.children())
    return isinstance(module, _CONTAINERS) and any(next(c.children(), None) for c in children)


class Gathering:
    """The passes of a step through a network whose weights are divided."""

    def __init__(self, hold: Hold, keep: Hold, shards: int, *, copies: bool) -> None:
        """``hold`` takes memory at once, and ``keep`` as the operation after that begins.

        ``copies`` is whether the sum is made in a copy.
        """
        self.hold, self.keep, self.shards, self.copies = hold, keep, shards, copies
        self.order: list[_Unit] = []  # of the forward passes
        self.arrived: Release | None = None  # a piece that is not needed any more
        self.summed: Release | None = None  # a piece of gradients, the same

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, a step through ``model`` takes the memory that it would with divided weights."""
        blocks = find_units(model)
        taken = {parameter for block in blocks for parameter in block.parameters()}
        rest = [parameter for parameter in model.parameters() if parameter not in taken]
        units = [_Unit(self, block, [*block.parameters()]) for block in blocks]
        root = _Unit(self, model, rest, is_root=True)
        try:
            yield
            for unit in (root, *units):
                unit.finish()
        finally:
            self.drop("arrived")
            self.drop("summed")
            for unit in (root, *units):
                unit.remove()

    def drop(self, name: str) -> None:
        """Release the piece "arrived" or "summed", if there is one."""
        if release := getattr(self, name):
            release()
            setattr(self, name, None)


class _Unit:
    """Weights that come together at once."""

    def __init__(
        self,
        step: Gathering,
        module: nn.Module,
        parameters: list[nn.Parameter],
        *,
        is_root: bool = False,
    ) -> None:
        self._step, self._is_root = step, is_root
        self._whole = step.shards * sum(shard_bytes(p, step.shards) for p in parameters)
        self._piece: Release | None = None
        self._weights: Release | None = None
        self._gradients: dict[nn.Parameter, Release] = {}
        self._turns: list[int] = []  # among the forward passes
        self._is_done = self._is_in_backward = False
        hooks = [
            module.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True),
            module.register_forward_hook(self._end),
        ]
        hooks += [
            parameter.register_post_accumulate_grad_hook(self._accumulate)
            for parameter in parameters
            if parameter.requires_grad
        ]
        self._hooks = hooks

    def remove(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _fetch(self) -> None:
        if not (self._piece or self._weights):
            self._piece = self._step.hold(self._whole)

    def _unpack(self, *, in_forward: bool) -> None:
        if self._piece is None:
            return
        step, piece = self._step, self._piece
        if in_forward:
            step.drop("arrived")
        self._weights, self._piece = step.hold(self._whole), None
        if in_forward:
            step.arrived = piece
        else:
            piece()

    def _give_up(self) -> None:
        if self._weights:
            self._weights()
            self._weights = None

    def _begin(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._is_in_backward:
            return args, kwargs
        self._fetch()
        self._unpack(in_forward=True)
        if torch.is_grad_enabled():
            args = _before_all(args, self.finish)
        return args, kwargs

    def _end(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self._is_in_backward:
            return
        if torch._C._current_graph_task_id() == -1:
            self._give_up()
            self._turns.append(len(self._step.order))
            self._step.order.append(self)
        if torch._C._current_graph_task_id() != -1 or self._is_root:
            self._step.drop("arrived")
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(self._enter_backward)

    def _enter_backward(self, _gradient: Tensor) -> None:
        if self._is_in_backward:
            return
        self._is_in_backward, self._is_done = True, False
        self._fetch()
        self._unpack(in_forward=False)
        if self._turns and (turn := self._turns.pop()):
            self._step.order[turn - 1]._fetch()

    def _accumulate(self, parameter: nn.Parameter) -> None:
        parameter.grad = None
        self._gradients.setdefault(parameter, self._step.keep(parameter.nbytes))

    def finish(self) -> None:
        """Release the weights, and sum the gradients over the processes."""
        if self._is_done:
            return
        self._is_done, step = True, self._step
        self._give_up()
        if self._piece:
            self._piece()
            self._piece = None
        step.drop("summed")
        if not self._gradients:
            return
        part = sum(shard_bytes(parameter, step.shards) for parameter in self._gradients)
        step.summed = step.hold(step.shards * part)
        for release in self._gradients.values():
            release()
        self._gradients.clear()
        own = step.hold(part)
        if step.copies:
            step.hold(step.shards * part)()
        own()


class _Before(torch.autograd.Function):
    """The identity, after whose backward pass ``action`` is called."""

    @staticmethod
    def forward(ctx: Any, action: Release, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.action = action
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        ctx.action()
        return None, *gradients


def _before_all(args: tuple[Any, ...], action: Release) -> tuple[Any, ...]:
    """Return ``args`` such that backward calls ``action`` when it is through with their use."""
    places = [n for n, arg in enumerate(args) if isinstance(arg, Tensor) and arg.requires_grad]
    if not places:
        return args
    outputs = _Before.apply(action, *(args[n] for n in places))
    found = dict(zip(places, outputs, strict=True))
    return tuple(found.get(n, arg) for n, arg in enumerate(args))

"""Running a block twice: once forgetting what backward needs, once, during backward, keeping it.

Whatever must be the same both times is arranged here: which modules are training, parameters,
buffers (the second run works on copies, so BatchNorm's statistics are updated once), random
numbers, autocast, and which inputs require gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase

from momconv.errors import InversionError, NotReproducible, UsageError


class Replay:
    """One call of a block that is going to be repeated.

    The graph that the first call leaves is the ordinary one, except that its saved tensors are
    numbers. Backward finds the tensors under these numbers once :meth:`repeat` has been called.

    Backward asks for the last tensors first. ``in_parts``, a block is therefore repeated twice: for
    the tensors from the first of its largest on, such as the hidden layer of an MLP, and, when
    backward has used these up, for those before it, such as what attention saved.
    """

    def __init__(self, block: nn.Module, *, in_parts: bool = False) -> None:
        self._block = block
        self._in_parts = in_parts
        modules = [*block.modules()]
        self._modes = [(module, module.training) for module in modules]
        # The tensors themselves: torch.func.functional_call may have put others in place.
        self._parameters = entries_of(modules, "_parameters")
        self._buffers = entries_of(modules, "_buffers")
        self._before: dict[int, Tensor] = {}  # values of the buffers that the first call changed
        self._watched: list[tuple[Tensor, int]] = []  # what must not change, with its version
        self._saved: dict[int, Tensor] = {}
        self._inputs: list[Tensor] = []  # for a second repetition

    def first(self, x: Tensor, *args: Tensor) -> Tensor:
        """block(x, *args), dropping what it saves for backward."""
        # Autocast's cache would keep a copy of every weight until the end of the forward pass.
        settings = autocast_settings(x.device.type) | {"cache_enabled": False}
        with torch.autocast(**settings), self.forgetting(x, *args):
            return evaluate(self._block, x, *args)

    @contextmanager
    def forgetting(self, x: Tensor, *args: Tensor) -> Iterator[None]:
        """What is computed inside is the block's first call, whose saved tensors are dropped."""
        self._requires_grad = [tensor.requires_grad for tensor in (x, *args)]
        self._args = [arg.detach() for arg in args]
        self._autocast = autocast_settings(x.device.type)
        buffers = [(b, version_of(b), b.clone()) for b in _buffers_that_count(self._modes)]
        args_before = [(arg, version_of(arg)) for arg in args]
        random_state = _random_state(x.device)
        sizes: list[int] = []  # in bytes, of what the block saves; what is kept anyway counts 0
        kept = {_memory_of(x)}
        if self._in_parts:
            kept |= {_memory_of(parameter) for _, _, parameter in self._parameters}

        def drop(tensor: Tensor) -> int:
            is_counted = self._in_parts and _memory_of(tensor) not in kept
            sizes.append(tensor.nbytes if is_counted else 0)
            return len(sizes) - 1

        with saved_tensors_hooks(drop, self._serve):
            yield
        for arg, version in args_before:
            require_unchanged(self._block, arg, version)
        self._before = {id(b): value for b, version, value in buffers if version_of(b) != version}
        unchanged = [b for b, _, _ in buffers if id(b) not in self._before]
        self.watch([*unchanged, *self._args, *(tensor for _, _, tensor in self._parameters)])
        self._count = len(sizes)
        self._middle = _find_middle(sizes, x.nbytes)
        # Only a block that drew numbers needs the state again: 5 KB a block add up.
        drew = not all(map(torch.equal, random_state, _random_state(x.device)))
        self._random_state = random_state if drew else []

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """From now until it is repeated, nobody must write into these, and no others."""
        self._watched = [(tensor, version_of(tensor)) for tensor in tensors]

    def postpone(self, x: Tensor) -> None:
        """Let the first tensor that backward asks for cause the repetition, for x."""
        self._middle = self._count
        self._inputs = self._detach(x)

    def repeat(self, x: Tensor) -> Tensor:
        """The same call once more, keeping what it saves; x must equal the first one.

        Raises:
            InversionError: somebody wrote into what the first call used.
            NotReproducible: the block saved more or fewer tensors than the first time.
        """
        self._require_unchanged()
        inputs = self._detach(x)
        self._saved = {}
        numbers = count()

        def keep(tensor: Tensor) -> int:
            number = next(numbers)
            if number >= self._middle:
                self._saved[number] = tensor.detach()
            return number

        y = self._call(inputs, keep)
        self._require_as_many(next(numbers), self._count)
        if self._middle:
            self._inputs = inputs
        else:
            self._forget_random_state()
        return y.detach()

    def _detach(self, x: Tensor) -> list[Tensor]:
        inputs = [tensor.detach() for tensor in (x, *self._args)]
        for tensor, requires_grad in zip(inputs, self._requires_grad, strict=True):
            tensor.requires_grad_(requires_grad)
        return inputs

    def _require_unchanged(self) -> None:
        watched, self._watched = self._watched, []
        if any(version_of(tensor) != version for tensor, version in watched):
            raise InversionError(
                f"what a {self._block._get_name()} computed with (weights, buffers or inputs) was"
                " modified in place before backward",
                kind="inversion.modified_inputs",
                fix="change it after backward, or let the network have a copy (.clone())",
            )

    def _require_as_many(self, saved: int, expected: int) -> None:
        if saved != expected:
            raise NotReproducible(
                f"a {self._block._get_name()} saved {expected} tensors for backward the"
                f" first time and {saved} when it was run again",
                kind="inversion.not_reproducible",
                fix='momconv.set_strategy(model, "store")',
            )

    def _repeat_beginning(self) -> None:
        """The call as far as the middle, keeping what it saves."""
        self._require_unchanged()  # of what :meth:`repeat` has found unchanged there is none left
        inputs, self._inputs = self._inputs, []
        numbers = count()

        def keep(tensor: Tensor) -> int:
            number = next(numbers)
            if number == self._middle:
                raise Enough
            self._saved[number] = tensor.detach()
            return number

        with suppress(Enough):
            self._call(inputs, keep)
        self._require_as_many(min(self._middle, next(numbers)), self._middle)
        self._forget_random_state()

    def _forget_random_state(self) -> None:
        """After the last repetition, unless the graph is kept for another backward pass."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._random_state = []

    def _call(self, inputs: list[Tensor], keep: Callable[[Tensor], int]) -> Tensor:
        copies = {id(b): self._before.get(id(b), b).clone() for _, _, b in self._buffers}
        buffers = [(where, name, copies[id(buffer)]) for where, name, buffer in self._buffers]
        with (
            torch.enable_grad(),
            torch.autocast(**self._autocast),
            _random_numbers(self._random_state, inputs[0].device),
            _in_modes(self._modes),
            in_place_of(self._parameters),
            in_place_of(buffers),
            saved_tensors_hooks(keep, self._serve),
        ):
            y: Tensor = self._block(*inputs)
        return y

    def _serve(self, number: int) -> Tensor:
        """Hand a tensor over, so that it is freed as soon as backward is done with it."""
        if number < self._middle and self._inputs:
            self._repeat_beginning()
        if number not in self._saved:
            raise InversionError(
                f"backward asked again for a tensor of a {self._block._get_name()} that is"
                " recomputed once",
                kind="inversion.second_backward",
                fix='momconv.set_strategy(model, "store")',
            )
        return self._saved.pop(number)


def _find_middle(sizes: list[int], input_bytes: int) -> int:
    """The number of the first of the largest tensors; 0 if little is saved before it."""
    middle = sizes.index(max(sizes)) if sizes else 0
    return middle if sum(sizes[:middle]) > input_bytes else 0


class Enough(Exception):
    """Ends a repetition of which no more is needed."""


def _memory_of(tensor: Tensor) -> int:
    """A number that tensors share if they share memory, and both exist."""
    number: int = tensor.untyped_storage()._cdata
    return number


def _buffers_that_count(modes: list[tuple[nn.Module, bool]]) -> list[Tensor]:
    """The buffers that a result may depend on: not the statistics that a norm only updates."""
    return [
        buffer
        for module, training in modes
        if module._buffers and not (training and isinstance(module, _NormBase))
        for buffer in module._buffers.values()
        if buffer is not None
    ]


Entry = tuple[dict[str, Any], str, Tensor]


def entries_of(modules: Sequence[nn.Module], kind: str) -> list[Entry]:
    """Where modules' parameters or buffers are written down, under which names, and they."""
    places: list[dict[str, Any]] = [getattr(module, kind) for module in modules]
    return [
        (at, name, tensor) for at in places for name, tensor in at.items() if tensor is not None
    ]


@contextmanager
def in_place_of(entries: list[Entry]) -> Iterator[None]:
    """Let modules find these tensors under their names. functional_call does it too, but slowly."""
    before = [where[name] for where, name, _ in entries]
    for where, name, tensor in entries:
        where[name] = tensor
    try:
        yield
    finally:
        for (where, name, _), tensor in zip(entries, before, strict=True):
            where[name] = tensor


@contextmanager
def _in_modes(modes: list[tuple[nn.Module, bool]]) -> Iterator[None]:
    """Let each module train, or not."""
    others = [module for module, training in modes if module.training != training]
    for module in others:
        module.training = not module.training
    try:
        yield
    finally:
        for module in others:
            module.training = not module.training


def evaluate(block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    """block(x, *args), which must leave x alone: x is needed again.

    Raises:
        UsageError: the block wrote into x.
    """
    version = version_of(x)
    y: Tensor = block(x, *args)
    require_unchanged(block, x, version)
    return y


def require_unchanged(block: nn.Module, x: Tensor, version: int) -> None:
    """Do nothing if nobody wrote into x since it had this version.

    Raises:
        UsageError: the block did.
    """
    if version_of(x) != version:
        raise UsageError(
            f"a {block._get_name()} modifies its input in place",
            kind="model.modifies_input",
            fix="inplace=False in the first operation of the block",
        )


def version_of(tensor: Tensor) -> int:
    """A number that changes when somebody writes into ``tensor``; inference mode counts nothing."""
    return 0 if tensor.is_inference() else tensor._version


class _Before(torch.autograd.Function):
    """The identity, which calls ``action`` in backward before the gradient passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, action: Callable[..., object], *kept: Tensor) -> Tensor:
        ctx.action = action
        ctx.save_for_backward(*kept)  # so that autograd lets go of them when it is done
        return y.detach()  # y itself would be a view, which no in-place operation may follow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.action(*ctx.saved_tensors)
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def before_backward(y: Tensor, action: Callable[..., object], *kept: Tensor) -> Tensor:
    """Y, such that backward calls ``action(*kept)`` before it enters the graph that made y.

    A node of its own, so that nothing of the previous node's work is alive during the action.
    """
    return _Before.apply(y, action, *kept) if y.requires_grad else y


def checkpoint(
    block: nn.Module, x: Tensor, args: tuple[Tensor, ...] = (), *, in_parts: bool = False
) -> Tensor:
    """block(x, *args), keeping only x and args, and computing the block again in backward."""
    if not torch.is_grad_enabled():
        return evaluate(block, x, *args)
    replay = Replay(block, in_parts=in_parts)
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

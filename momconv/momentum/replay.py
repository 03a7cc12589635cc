"""Running a block twice: once forgetting what backward needs, once, during backward, keeping it.

So does ``torch.utils.checkpoint``, which keeps the block's input to run it again. This takes the
input from whoever has it, so that a run can reconstruct it, and beyond that

* updates BatchNorm's running statistics, and any other buffer, once and not twice;
* notices what was written to in between, and a block that saves other tensors the second time;
* frees each saved tensor as soon as backward is done with it, and can repeat a block in two parts;
* looks at random generators that were used, not at all that there are.

Whatever must be the same both times is arranged here: which modules are training, parameters,
buffers (the second run works on copies, so BatchNorm's statistics are updated once; or it knows
them, see faster/norms.py), random numbers, autocast, and which inputs require gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase

from momconv.errors import InversionError, NotReproducible, UsageError
from momconv.momentum.faults import tell_fault
from momconv.momentum.measures import checksum
from momconv.momentum.members import call_block
from momconv.momentum.seam import Cut, Norms, PlainCut
from momconv.states import (
    Condition,
    autocast_settings,
    is_fake,
    keeping_random_state,
    version_of,
)


class Replay:
    """One call of a block that is going to be repeated.

    The graph that the first call leaves is the ordinary one, except that its saved tensors are
    numbers. Backward finds the tensors under these numbers once :meth:`repeat` has been called.

    ``in_parts``, it is repeated twice: for the tensors from the middle on, and then for those
    before it; see faster/parts.py. It must compute what it did: its output is compared by a
    checksum or, if it ``is_open`` and has no output, all that it saves is.
    """

    def __init__(self, block: nn.Module, *, in_parts: bool = False, is_open: bool = False) -> None:
        self._block = block
        self._is_open = is_open
        self._in_parts = in_parts
        self._cut: PlainCut | None = None  # during the first call
        modules = [*block.modules()]
        self._updating = [*filter(_updates_statistics, modules)] if is_open else []
        self._norms = Norms(modules)
        self._condition = Condition(modules, self._norms.others)
        # Of the first call:
        self._sum: Tensor | None = None  # of its output, or else of what it saved
        self._sum_again: Tensor | None = None  # of what a repetition saved
        self._requires_grad: Sequence[bool] = ()  # x and the further arguments
        self._args: Sequence[Tensor] = ()
        self._autocast: dict[str, Any] = {}
        self._random_state: Sequence[Tensor] = ()  # if it drew numbers
        self._before: dict[int, Tensor] = {}  # values of the buffers that it changed
        self._count = 0  # of what it saved
        self._middle = 0  # number of the first of it that the first repetition keeps
        self._watched: Sequence[Tensor] = ()  # what must not change
        self._versions: Sequence[int] = ()  # of these
        self._saved: dict[int, Tensor] = {}
        self._inputs: Sequence[Tensor] = ()  # for a second repetition

    def first(self, x: Tensor, *args: Tensor) -> Tensor:
        """Return block(x, *args), dropping what it saves for backward."""
        with self.forgetting(x, *args):
            y = evaluate(self._block, x, *args)
        if self._cut:
            self._middle = self._cut.find_middle(little=max(x.nbytes, y.nbytes))
            self._cut = None
        self._sum = _sum(y)
        return y

    @contextmanager
    def forgetting(self, x: Tensor, *args: Tensor) -> Iterator[None]:
        """What is computed inside is the block's first call, whose saved tensors are dropped."""
        self._requires_grad = tuple(tensor.requires_grad for tensor in (x, *args))
        self._args = tuple(arg.detach() for arg in args)
        self._autocast = autocast_settings(x.device.type)
        counting = _buffers_that_count(self._norms.others)
        versions, values = [*map(version_of, counting)], [b.clone() for b in counting]
        versions_of_args = [*map(version_of, args)]
        before = random_state(x.device)
        if self._in_parts:
            self._cut = Cut([x, *self._condition.parameters])
        with _saving(self._drop, self._serve), self._norms.remembering():
            yield
        for arg, version in zip(args, versions_of_args, strict=True):
            require_unchanged(self._block, arg, version)
        unchanged = []
        for buffer, version, value in zip(counting, versions, values, strict=True):
            if version_of(buffer) == version:
                unchanged.append(buffer)
            else:
                self._before[id(buffer)] = value
        self._condition.add_buffers(self._norms.finish())
        self.watch([*unchanged, *self._args, *self._condition.parameters])
        # Only a block that drew numbers needs the state again: 5 KB a block add up.
        drew = not all(map(torch.equal, before, random_state(x.device)))
        self._random_state = before if drew else ()

    def _drop(self, tensor: Tensor) -> int | Tensor:
        """Return a number for what the first call saves, or what a norm keeps."""
        if self._norms.own(tensor):
            return tensor
        if self._cut:
            self._cut.note(tensor)
        if self._is_open and not self._is_statistic(tensor):
            self._sum = _plus(self._sum, tensor)
        self._count += 1
        return self._count - 1

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Make it an error to write into these tensors before the call is repeated."""
        self._watched = [*tensors]
        self._versions = tuple(map(version_of, self._watched))

    def postpone(self, x: Tensor) -> None:
        """Let the first tensor that backward asks for cause the repetition, for x."""
        self._middle = self._count
        self._inputs = self._detach(x)

    def repeat(self, x: Tensor, *, is_same: bool = True) -> Tensor:
        """Make the same call once more, keeping what it saves; x must equal the first, if it can.

        Raises:
            InversionError: somebody wrote into what the first call used.
            NotReproducible: the block saved more or fewer tensors than the first time.
        """
        self._stop_watching()
        inputs = self._detach(x)
        self._saved = {}
        with self._keeping(self._middle):
            y = self._call(inputs)
        if is_same:
            self._require_same(_sum(y))
        if self._middle:
            self._inputs = inputs
        else:
            self._forget_random_state()
        return y.detach()

    def rerun(self, x: Tensor) -> Tensor:
        """Return once more what the first call returned, before the repetition."""
        self._require_unchanged()
        # With a graph, of which nothing is kept: without one, PyTorch may take other kernels.
        with self._keeping(self._count):
            y = self._call(self._detach(x)).detach()
        self._require_same(_sum(y))
        return y

    def _require_same(self, computed: Tensor | None) -> None:
        """Do nothing if this is the first call's checksum, which on a GPU waits for it.

        Raises:
            NotReproducible: It is something else.
        """
        if self._sum is not None and computed != self._sum:
            tell_fault(
                NotReproducible(
                    f"a {self._block._get_name()} computed something else when it was run again",
                    kind="inversion.not_reproducible",
                    fix='momconv.set_strategy(model, "store")',
                )
            )

    def _detach(self, x: Tensor) -> list[Tensor]:
        inputs = [tensor.detach() for tensor in (x, *self._args)]
        for tensor, requires_grad in zip(inputs, self._requires_grad, strict=True):
            tensor.requires_grad_(requires_grad)
        return inputs

    def _stop_watching(self) -> None:
        """Require that what was watched is unchanged; let it go unless backward comes again."""
        self._require_unchanged()
        if not _is_graph_kept():
            self._watched = ()

    def _require_unchanged(self) -> None:
        if any(map(int.__ne__, map(version_of, self._watched), self._versions)):
            raise InversionError(
                f"what a {self._block._get_name()} computed with (weights, buffers or inputs) was"
                " modified in place before backward",
                kind="inversion.modified_inputs",
                fix="change it after backward, or let the network have a copy (.clone())",
            )

    def _repeat_beginning(self) -> None:
        """Make the call as far as the middle, keeping what it saves."""
        self._stop_watching()  # if :meth:`repeat` has not, in a stem
        inputs, self._inputs = self._inputs, ()
        self._sum_again = None
        with self._keeping(0, self._middle - 1):
            self._call(inputs)
        if self._is_open:
            self._require_same(self._sum_again)
        self._forget_random_state()

    @contextmanager
    def _keeping(self, first: int, last: int | None = None) -> Iterator[None]:
        """Inside, what is saved has the numbers of the first time, and is kept from ``first`` on.

        It ends with ``last``, before the operation that saves it computes anything.
        """
        numbers = count()

        def keep(tensor: Tensor) -> int | None:
            if self._norms.own(tensor):
                return None
            if self._is_open and not self._is_statistic(tensor):
                self._sum_again = _plus(self._sum_again, tensor)
            number = next(numbers)
            if number >= first:
                self._saved[number] = tensor.detach()
            if number == last:
                raise Enough
            return number

        with suppress(Enough), torch.enable_grad(), saved_tensors_hooks(keep, self._serve):
            yield
        saved, expected = next(numbers), self._count if last is None else last + 1
        if saved != expected:
            raise NotReproducible(
                f"a {self._block._get_name()} saved {expected} tensors for backward the"
                f" first time and {saved} when it was run again",
                kind="inversion.not_reproducible",
                fix='momconv.set_strategy(model, "store")',
            )

    def _is_statistic(self, tensor: Tensor) -> bool:
        """Return whether a norm has this to update, which it saves and backward does not use."""
        if is_fake(tensor):
            return False
        place = tensor.data_ptr()
        own = (buffer for norm in self._updating for buffer in norm.buffers(recurse=False))
        return any(buffer.data_ptr() == place for buffer in own)

    def _forget_random_state(self) -> None:
        """Forget random numbers, unless the graph is kept for another backward pass."""
        if not _is_graph_kept():
            self._random_state = ()

    def _call(self, inputs: Sequence[Tensor]) -> Tensor:
        buffers = self._condition.buffers
        copies = {id(b): self._before.get(id(b), b).clone() for b in buffers}
        with (
            _autocast(self._autocast),
            _random_numbers(self._random_state, inputs[0].device),
            self._condition.restored(self._condition.parameters, [copies[id(b)] for b in buffers]),
            self._norms.recalling(),
        ):
            y: Tensor = call_block(self._block, *inputs)
        return y

    def _serve(self, number: int | Tensor) -> Tensor:
        """Hand a tensor over, so that it is freed as soon as backward is done with it."""
        require_first_derivatives()
        if isinstance(number, Tensor):
            return number
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


@contextmanager
def _saving(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Iterator[None]:
    """``saved_tensors_hooks``, which may also end before others that have begun later.

    A stem ends inside a checkpoint that its model has put around its first stage.
    """
    autograd = torch._C._autograd
    autograd._push_saved_tensors_default_hooks(pack, unpack)
    try:
        yield
    finally:
        later = []
        while (hooks := top_saved_tensors_hooks()) and hooks[0] is not pack:
            later.append(hooks)
            autograd._pop_saved_tensors_default_hooks()
        autograd._pop_saved_tensors_default_hooks()
        for hooks in reversed(later):
            autograd._push_saved_tensors_default_hooks(*hooks)


def top_saved_tensors_hooks() -> Any:
    """Return the innermost ``saved_tensors_hooks`` that are open, if any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _is_graph_kept() -> bool:
    """Return whether the backward pass that is under way keeps the graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def require_first_derivatives() -> None:
    """Do nothing in a backward pass of which there will be no derivatives.

    Raises:
        UsageError: This one is to be differentiated again.
    """
    if torch.is_grad_enabled():
        raise UsageError(
            "what is recomputed or reconstructed in backward has no second derivatives",
            kind="usage.second_derivatives",
            fix='momconv.set_strategy(model, "store")',
        )


def _sum(x: Tensor) -> Tensor | None:
    """Return a checksum of x, of which fakes have none."""
    return None if is_fake(x) else checksum(x)


def _plus(total: Tensor | None, x: Tensor) -> Tensor | None:
    """Return ``total``, None at first, with the checksum of one more tensor."""
    added = _sum(x)
    return added if total is None or added is None else 3 * total + added  # in this order


class Enough(Exception):
    """Ends a repetition of which no more is needed."""


def _buffers_that_count(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the buffers that a result may depend on: not statistics that a norm only updates."""
    return [
        buffer
        for module in modules
        if module._buffers and not _updates_statistics(module)
        for buffer in module._buffers.values()
        if buffer is not None
    ]


def _updates_statistics(module: nn.Module) -> bool:
    return module.training and isinstance(module, _NormBase)


def evaluate(block: nn.Module, x: Tensor, *args: Tensor) -> Tensor:
    """Return block(x, *args), which must leave x alone: x is needed again.

    Raises:
        UsageError: the block wrote into x, or returned something else than a tensor.
    """
    version = version_of(x)
    y = require_tensor(block, call_block(block, x, *args))
    require_unchanged(block, x, version)
    return y


def require_tensor(block: nn.Module, y: Any) -> Tensor:
    """Return y, what the block has returned.

    Raises:
        UsageError: It is no tensor.
    """
    if not isinstance(y, Tensor):
        raise UsageError(
            f"a {block._get_name()} returned a {type(y).__name__}, not a tensor",
            kind="model.no_tensor",
            fix="a block whose forward returns x + f(x) alone",
        )
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


class _Before(torch.autograd.Function):
    """The identity, which calls ``action`` in backward before the gradient passes."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, action: Callable[..., object], *kept: Tensor) -> Tensor:
        ctx.action = action
        ctx.save_for_backward(*kept)  # so that autograd lets go of them when it is done
        return y.detach()  # y itself would be a view, which no in-place operation may follow

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        require_first_derivatives()
        ctx.action(*ctx.saved_tensors)
        return gradient, *(None for _ in ctx.needs_input_grad[1:])


def before_backward(y: Tensor, action: Callable[..., object], *kept: Tensor) -> Tensor:
    """Return y, such that backward calls ``action(*kept)`` before it enters y's graph.

    A node of its own, so that nothing of the previous node's work is alive during the action.
    """
    return _Before.apply(y, action, *kept) if y.requires_grad else y


def checkpoint(block: nn.Module, x: Tensor, *args: Tensor, in_parts: bool = False) -> Tensor:
    """Return block(x, *args), keeping only x and args; backward computes the block again."""
    if not torch.is_grad_enabled():
        return evaluate(block, x, *args)
    replay = Replay(block, in_parts=in_parts)
    return before_backward(replay.first(x, *args), replay.repeat, x.detach())


def without_autocast_cache(device_type: str) -> AbstractContextManager[Any]:
    """Inside, autocast is as it was, but without its cache.

    That would keep a copy of every weight until the end of the forward pass. And a weight that is
    used twice would have its gradients added up in the narrow type, which no copy made in backward
    can be part of.
    """
    return _autocast(autocast_settings(device_type) | {"cache_enabled": False})


def _autocast(settings: dict[str, Any]) -> AbstractContextManager[Any]:
    """Return torch.autocast, or nothing, which is faster, where it is off and to be off."""
    is_off = not settings["enabled"] and not torch.is_autocast_enabled(settings["device_type"])
    return nullcontext() if is_off else torch.autocast(**settings)


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of the CPU's generator and of the device's own."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: Sequence[Tensor], device: torch.device) -> None:
    """Draw the numbers that follow what :func:`random_state` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _random_numbers(states: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """Draw the numbers that follow ``states`` (none: do not touch the generators)."""
    if not states:
        yield
        return
    with keeping_random_state(device):
        set_random_state(states, device)
        yield

"""Finding the runs of residual blocks in sequences of modules, by one pass on fake tensors.

A block is residual if its input reaches its output by nothing but additions, changes of layout and,
once something has been added, activations and normalisation: x + f(x), ReLU(x + f(x)), or several
of these in a row. Whether it does is seen in the operations, whatever the block's class is.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from momconv.errors import UsageError
from momconv.states import (
    Condition,
    autocast_settings,
    is_fake,
    keep_buffers,
    keeping_attributes,
    keeping_random_state,
    without_hooks,
)

# Its name, and the shapes of the tensors that it gets; or what a block is called with besides.
Operation = tuple[str, list[torch.Size]]

aten = torch.ops.aten
_SUMS = (aten.add, aten.add_, aten.sub, aten.sub_)
_COPIES = (aten.clone, aten._to_copy, aten._unsafe_view)
_NORMS = (aten.native_layer_norm, aten.native_batch_norm, aten._native_batch_norm_legit)

# What fake tensors raise where a value is needed, which they do not have.
DEPENDS_ON_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


@dataclass(frozen=True, slots=True)
class ObservedCall:
    """One call of a block, on fake tensors."""

    x: Any
    others: list[Any]  # the leaves of all further arguments
    structure: TreeSpec  # which the leaves are of
    output: Any
    is_residual: bool


@dataclass(frozen=True, slots=True)
class Observation:
    """What happened in one pass: the calls of each block, and all operations in order."""

    calls: dict[nn.Module, list[ObservedCall]]
    operations: list[Operation]
    shapes: list[torch.Size]  # of the pass's outputs


def find_runs(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...]) -> list[range]:
    """Return two or more consecutive residual blocks that keep the shape of their input.

    The blocks are traced from x on fake tensors: nothing is computed, no memory is taken, and no
    buffer or random state changes. There is a warning where none are found.

    Raises:
        UsageError: What they do depends on values, which fake tensors do not have.
    """
    count = len(blocks)
    fix = f"runs=[Run(0, {count}, (1.0,) * {count})], with the bounds of each run"
    try:
        with without_hooks(blocks):
            calls = observe(_Chain(blocks), blocks, (x, *args)).calls
    except (RuntimeError, TypeError, ValueError) as error:  # as NumPy's functions raise them
        if not isinstance(error, DEPENDS_ON_VALUES):
            if is_fake(x):
                raise
            _require_callable(blocks, x, args)
        raise UsageError(
            f"what these blocks do depends on values, so that no run is found among them: {error}",
            kind="model.depends_on_values",
            fix=fix,
        ) from error
    runs = group_runs(blocks, calls)
    if not runs and count > 1:
        reason = explain_no_run(blocks, calls)
        warnings.warn(f"no block follows the momentum rule: {reason}; fix: {fix}", stacklevel=2)
    return runs


@torch.no_grad()
def _require_callable(blocks: Sequence[nn.Module], x: Tensor, args: tuple[Tensor, ...]) -> None:
    """Raise what the blocks raise where there are values, and leave nothing behind."""
    modules = [*nn.ModuleList(blocks).modules()]
    restore = keep_buffers(modules)
    try:
        with keeping_attributes(modules), keeping_random_state(x.device), without_hooks(blocks):
            _Chain(blocks)(x.clone(), *args)
    finally:
        restore()


def group_runs(
    blocks: Sequence[nn.Module],
    calls: dict[nn.Module, list[ObservedCall]],
    *,
    with_own: bool = False,
) -> list[range]:
    """Return the runs among ``blocks``, each of which goes on where the one before it ends.

    ``with_own``, each of a run's blocks may have further arguments of its own.
    """
    of_each = [_calls_at(n, blocks, calls) for n in range(len(blocks))]
    groups: list[list[int]] = [[]]
    for n, own in enumerate(of_each):
        is_member = _is_member(own)
        if not is_member or (groups[-1] and not _follows(of_each[n - 1], own, with_own=with_own)):
            groups.append([])
        if is_member:
            groups[-1].append(n)
    return [range(group[0], group[-1] + 1) for group in groups if len(group) > 1]


def is_chain(
    module: nn.Module, blocks: Sequence[nn.Module], calls: dict[nn.Module, list[ObservedCall]]
) -> bool:
    """Return whether ``module`` has called ``blocks`` in turn, each with no more than a tensor."""
    own, of_each = calls[module], [calls[block] for block in blocks]
    if not own or any(len(each) != len(own) for each in of_each):
        return False
    return all(
        not any(call.others for call in row)
        and row[0].x is whole.x
        and all(after.x is before.output for before, after in pairwise(row))
        and row[-1].output is whole.output
        for whole, *row in zip(own, *of_each, strict=True)
    )


def has_neighbours(blocks: Sequence[nn.Module], calls: dict[nn.Module, list[ObservedCall]]) -> bool:
    """Return whether two blocks side by side could be in a run."""
    members = _list_members(blocks, calls)
    return any(n - 1 in members for n in members)


def _list_members(
    blocks: Sequence[nn.Module], calls: dict[nn.Module, list[ObservedCall]]
) -> list[int]:
    """Return the places of the blocks that could be in a run."""
    return [n for n in range(len(blocks)) if _is_member(_calls_at(n, blocks, calls))]


def explain_no_run(blocks: Sequence[nn.Module], calls: dict[nn.Module, list[ObservedCall]]) -> str:
    """Return why there is no run among ``blocks``: what keeps two of them apart.

    If none could be in one, it is what the last block of their commonest class does.
    """
    members = _list_members(blocks, calls)
    pairs = [n for n in members if n - 1 in members]
    if pairs:
        n = pairs[-1]
        gap = _explain_gap(_calls_at(n - 1, blocks, calls), _calls_at(n, blocks, calls))
        return f"{type(blocks[n]).__name__} {n} {gap}"
    if members:
        n = members[-1]
        return f"{type(blocks[n]).__name__} {n} has no other residual block of its shape next to it"
    kind, _ = Counter(map(type, blocks)).most_common(1)[0]
    last = max(n for n, block in enumerate(blocks) if type(block) is kind)
    return f"{kind.__name__} {last} {_explain(calls[blocks[last]])}"


def _explain_gap(before: list[ObservedCall], after: list[ObservedCall]) -> str:
    """Return why the second block does not take over where the first ends."""
    first, second = before[0], after[0]
    if second.x is not first.output:
        return "does not get what the block before it returns"
    reason = "does not get the same further arguments as the block before it"
    if first.structure != second.structure:
        return reason
    places = range(len(first.others))
    differing = {n for n in places if not is_same(first.others[n], second.others[n])}
    rest, kwargs = tree_unflatten([*places], first.structure)
    named = {f"argument {n + 1}": arg for n, arg in enumerate(rest, 1)} | kwargs
    names = [name for name, arg in named.items() if differing & {*tree_leaves(arg)}]
    return f"{reason}: {names[0]} differs" if names else reason


def _explain(calls: list[ObservedCall]) -> str:
    if not calls:
        return "is not called"
    x, output = calls[0].x, calls[0].output
    if not isinstance(x, Tensor):
        return "gets no tensor as its first positional argument"
    if not isinstance(output, Tensor):
        return f"returns a {type(output).__name__}, not a tensor"
    if output.shape != x.shape:
        return "changes the shape of its input"
    return "does not add something to its input"


def observe(model: nn.Module, blocks: Iterable[nn.Module], inputs: Sequence[Tensor]) -> Observation:
    """Run ``model`` on fake tensors like ``inputs`` and watch ``blocks`` of it."""
    x = inputs[0]
    mode = x.fake_mode if isinstance(x, FakeTensor) else FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [_imitate(tensor, mode) for tensor in inputs]
    kind = x.device.type
    settings = autocast_settings(kind)
    observer = _Observer(blocks)
    # Without autocast's cache of cast weights, which would keep fake ones for the real pass.
    with (
        ExitStack() as stack,
        torch.autocast(**settings | {"cache_enabled": False}),
        _without_fused_layers(),
    ):
        observer.hook(stack)
        output = call_on_fakes(model, fakes, mode, observer)
    shapes = [leaf.shape for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    return Observation(observer.calls, observer.operations, shapes)


@contextmanager
def _without_fused_layers() -> Iterator[None]:
    """Let ``nn.TransformerEncoderLayer`` have operations that can be followed, not one for all."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def call_on_fakes(
    module: nn.Module, inputs: Sequence[Tensor], mode: FakeTensorMode, observer: TorchDispatchMode
) -> Any:
    """Return module(*inputs) with fake parameters and buffers, as real buffers would change.

    What else it keeps of its own would be fake, too, and is forgotten.
    """
    modules = [*module.modules()]
    own = Condition(modules, modules)
    parameters = [_imitate(tensor, mode) for tensor in own.parameters]
    buffers = [_imitate(tensor, mode) for tensor in own.buffers]
    # functional_call leaves fakes behind in a module that has two names.
    with (
        keeping_attributes(modules),
        own.restored(parameters, buffers),
        mode,
        observer,
        torch.no_grad(),
    ):
        return module(*inputs)


def _calls_at(
    n: int, blocks: Sequence[nn.Module], calls: dict[nn.Module, list[ObservedCall]]
) -> list[ObservedCall]:
    """Return the calls of the block at place n; one with several places has a call at each."""
    places = [m for m, block in enumerate(blocks) if block is blocks[n]]
    return calls[blocks[n]][places.index(n) :: len(places)]


def _is_member(calls: list[ObservedCall]) -> bool:
    """Return whether a block was called, and each time kept its input's shape and added to it."""
    return bool(calls) and all(
        call.is_residual and call.output.shape == call.x.shape for call in calls
    )


def _follows(before: list[ObservedCall], after: list[ObservedCall], *, with_own: bool) -> bool:
    """Return whether each call gets the output of the one before and equal other arguments."""
    return len(before) == len(after) and all(
        second.x is first.output and (with_own or _has_same_arguments(first, second))
        for first, second in zip(before, after, strict=True)
    )


def _has_same_arguments(first: ObservedCall, second: ObservedCall) -> bool:
    return first.structure == second.structure and all(map(is_same, first.others, second.others))


def is_same(first: object, second: object) -> bool:
    """Return whether two arguments are one tensor, say, or equal numbers."""
    return first is second or (isinstance(first, int | float | str) and first == second)


class _Chain(nn.Module):
    """Blocks in turn, each called with the same further arguments."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, *args: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *args)
            if not isinstance(x, Tensor):  # which is refused when it runs
                break
        return x


class _Flow:
    """What becomes of a tensor x in the operations that follow."""

    def __init__(self, x: object) -> None:
        # Of each tensor that depends on x: does it hold x itself (False), x and something that was
        # added (True), or neither (None)? The tensors are kept, so that no number is used twice.
        self._states: dict[int, tuple[object, bool | None]] = {id(x): (x, False)}

    def has_added(self, y: object) -> bool:
        """Return whether y holds x and something that was added to it."""
        return bool(self._state(y))

    def follow(self, func: OpOverload, inputs: Sequence[Tensor], results: list[Tensor]) -> None:
        """Take note of what ``func`` makes of x."""
        if any(id(tensor) in self._states for tensor in inputs):
            # Before any is noted: a result may be an input that was written to.
            states = [self._derive(func, inputs, result) for result in results]
            for result, state in zip(results, states, strict=True):
                self._states[id(result)] = (result, state)

    def _state(self, tensor: object) -> bool | None:
        return self._states[id(tensor)][1] if id(tensor) in self._states else None

    def _derive(self, func: OpOverload, inputs: Sequence[Tensor], result: Tensor) -> bool | None:
        holders = [tensor for tensor in inputs if self._state(tensor) is not None]
        if len(holders) != 1 or result.numel() != holders[0].numel():
            return None
        holder, kind = holders[0], func.overloadpacket
        added = self._state(holder)
        if kind in _SUMS and (holder is inputs[0] or kind in _SUMS[:2]):
            return added or len(inputs) > 1  # by more than a number
        if func.is_view or kind in _COPIES:
            return added
        is_unary = torch.Tag.pointwise in func.tags and len(inputs) == 1
        if is_unary and result is holder:  # a block that overwrites x is refused when it runs
            return added
        is_norm = kind in _NORMS and holder is inputs[0]
        return True if added and (is_unary or is_norm) else None


class _Observer(TorchDispatchMode):
    """Follows the input of each call of a block to the call's output."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: dict[nn.Module, list[ObservedCall]] = {block: [] for block in blocks}
        self.operations: list[Operation] = []
        self._open: list[_Flow] = []

    def hook(self, stack: ExitStack) -> None:
        """Watch the blocks until the stack is left."""
        for block in self.calls:
            hooks: tuple[Callable[..., Any], ...] = (
                partial(block.register_forward_pre_hook, self._enter),
                partial(block.register_forward_hook, self._leave),
            )
            for register in hooks:
                stack.callback(register(with_kwargs=True).remove)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._open.append(_Flow(args[0] if args else None))
        others = tree_leaves((args[1:], kwargs))
        constants = [leaf for leaf in others if isinstance(leaf, int | float | str)]
        if constants and not isinstance(block, nn.Sequential):  # which hands them on
            self.operations.append((f"a call with {constants}", []))

    def _leave(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        is_residual = self._open.pop().has_added(output)
        x, *rest = args or [None]
        self.calls[block].append(
            ObservedCall(x, *tree_flatten((rest, kwargs)), output, is_residual)
        )

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.operations.append((str(func), [leaf.shape for leaf in inputs]))
        results = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        for flow in self._open:
            flow.follow(func, inputs, results)
        return output


def _imitate(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    return tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor.detach())

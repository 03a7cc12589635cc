"""The blocks of runs, which notice when somebody calls them in turn as if there were no run.

``for block in stage: x = block(x)`` would be the plain network, and so would be PyTorch's
``checkpoint_sequential``, ``nn.Sequential(*stage)`` and much that other packages do. In a run no
block ever gets what another one has returned. So whoever calls one outside its stage must not give
it that: the tensor itself, a view, a copy in any type, or, in the graph of autograd or torch.fx,
what operations of one input make of it, such as a ReLU. Not seen are values that were changed where
there is no graph or by operations of several inputs, as ``1.5 * x``, dropout, or halves of a batch
that are put together again; and what is called as ``block.forward(x)``, of which no hook learns.
A block that is a run by itself, because the others have been taken out, nobody else may call.
"""

import threading
from collections.abc import Collection, Container, Iterable, Sequence
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from momconv.errors import UsageError
from momconv.momentum.measures import checksum
from momconv.states import is_fake, is_graph_made

_RETURNED = "_momconv_returned"  # an attribute of what members have returned
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_claimants = WeakKeyDictionary[nn.Module, WeakSet[nn.Module]]()  # the stages of members
_this_thread = threading.local()  # called: a block; returned: checksums


def call_block(block: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Return block(…), called by its stage."""
    if torch.compiler.is_compiling():
        return block(*args, **kwargs)
    before = getattr(_this_thread, "called", None)
    _this_thread.called = block
    try:
        return block(*args, **kwargs)
    finally:
        _this_thread.called = before


def mark(
    stage: nn.Module,
    blocks: Collection[nn.Module | None],
    second: Container[nn.Module | None] = (),
    single: Container[nn.Module | None] = (),
) -> None:
    """Let these be members of a run of the stage.

    Those that are ``second`` get what the first has returned in the run, too. What is ``single`` is
    a run by itself.
    """
    claim(stage, blocks)
    for block in blocks:
        others = _require_run_but_second if block in second else _require_run
        hook = _require_stage if block in single else others
        if block is not None and hook not in block._forward_hooks.values():
            _remove_hooks(block)
            block.register_forward_hook(hook, with_kwargs=True)


def claim(stage: nn.Module, blocks: Iterable[nn.Module | None]) -> None:
    """Take note of what is marked already, as in a copy."""
    for block in blocks:
        if block is not None:
            _claimants.setdefault(block, WeakSet()).add(stage)


def unmark(stage: nn.Module, blocks: Iterable[nn.Module | None]) -> None:
    """Let these be ordinary blocks, unless another stage has them in a run."""
    for block in blocks:
        if block is None:
            continue
        others = _claimants.get(block, WeakSet())
        others.discard(stage)
        if not others:
            _remove_hooks(block)


def _remove_hooks(block: nn.Module) -> None:
    hooks = block._forward_hooks
    for key in [key for key, hook in hooks.items() if hook in _HOOKS]:
        del hooks[key]
        block._forward_hooks_with_kwargs.pop(key, None)


def _require_run(
    block: nn.Module, args: tuple[Any, ...], *rest: Any, by_value: bool = True
) -> None:
    """Do nothing if the block was called by its stage, or with what no other one has returned.

    Raises:
        UsageError: It was not.
    """
    *kwargs, y = rest  # a block that torch.compile has wrapped is not asked for its keywords
    is_compiling = torch.compiler.is_compiling()
    if type(y) is Proxy:
        _require_run_where_traced(block, tree_leaves((args, kwargs)), y)
    if not isinstance(y, Tensor) or not (is_compiling or _is_called_by_others(block)):
        return
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    x = tensors[0] if tensors else None
    by_value = by_value and not is_compiling
    if x is not None and (_is_returned(x) or (by_value and _is_copied(x))):
        _refuse(block)
    if any(y is x for x in tensors):
        return
    setattr(y, _RETURNED, True)
    if is_compiling:
        return
    if y.grad_fn is not None:
        _notes(y.grad_fn)[_RETURNED] = True
    # What is as it was may be the input of the next one in the run, too.
    is_new = x is None or not _values(x) & _values(y)
    _this_thread.returned = _values(y, *_FLOATS) if is_new else set()


def _require_run_where_traced(block: nn.Module, inputs: Sequence[Any], y: Proxy) -> None:
    """Do the same as ``_require_run`` where torch.fx writes down what is done."""
    nodes = [leaf.node for leaf in inputs if isinstance(leaf, Proxy)][:1]
    while len(nodes) == 1:
        if _RETURNED in nodes[0].meta:
            _refuse(block, ", or if an argument made the model call blocks one by one: " + _FX)
        nodes = nodes[0].all_input_nodes
    y.node.meta[_RETURNED] = True


_FX = "torch.fx.symbolic_trace(model, concrete_args={'its name': None})"


def _refuse(
    block: nn.Module, otherwise: str = "", *, how: str = "with what the block before it returned"
) -> NoReturn:
    raise UsageError(
        f"a {block._get_name()} of a momentum run was called {how}, which is the plain network and"
        " not the momentum network",
        kind="usage.outside_stage",
        fix="call the whole stage, or take momconv.revert(model) for the plain network" + otherwise,
    )


def _require_run_but_second(*args: Any) -> None:
    _require_run(*args, by_value=False)


def _require_stage(block: nn.Module, _args: Any, *rest: Any) -> None:
    is_traced = type(rest[-1]) is Proxy  # where a stage is one operation
    if not torch.compiler.is_compiling() and (is_traced or _is_called_by_others(block)):
        _refuse(block, how="by itself, outside its stage")


_HOOKS = (_require_run, _require_run_but_second, _require_stage)


def _is_called_by_others(block: nn.Module) -> bool:
    return getattr(_this_thread, "called", None) is not block


def _is_copied(x: Tensor) -> bool:
    """Return whether x has the values that a member has returned last, when others called it."""
    returned = getattr(_this_thread, "returned", set[int]())
    return bool(returned) and not returned.isdisjoint(_values(x))


def _values(x: Tensor, *dtypes: torch.dtype) -> set[int]:
    """Return the checksums of x in its own type or these, if it has values that can be seen."""
    is_plain = x.layout == torch.strided and not x.is_nested
    if is_graph_made() or is_fake(x) or not is_plain or is_traceable_wrapper_subclass(x):
        return set()
    x = x.detach()
    copies = [x.to(dtype) for dtype in dtypes if x.is_floating_point()]
    copies += [copy.to(x.dtype) for copy in copies] or [x]  # there and back again
    return {int(checksum(copy)) for copy in copies}


def _notes(node: Any) -> dict[str, Any]:
    """Return what is known of a node of the graph."""
    return node.metadata  # type: ignore[no-any-return]


def _is_returned(x: Tensor) -> bool:
    """Return whether a member has returned x, or something of which x is a view or a function."""
    if hasattr(x if x._base is None else x._base, _RETURNED):
        return True
    node = None if torch.compiler.is_compiling() else x.grad_fn
    while node is not None:
        if _RETURNED in _notes(node):
            return True
        # A step of a run has several inputs, of which x is one.
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return False

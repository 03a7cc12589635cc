"""The blocks of runs, which notice when somebody calls them in turn as if there were no run.

``for block in stage: x = block(x)`` would be the plain network, and so would be PyTorch's
``checkpoint_sequential``, ``nn.Sequential(*stage)`` and much that other packages do. In a run no
block ever gets what another one has returned.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from momconv.errors import UsageError

_RETURNED = "_momconv_returned"  # an attribute of what members have returned


def mark(blocks: Iterable[nn.Module | None]) -> None:
    """Let these be members of a run."""
    for block in blocks:
        if block is not None and _require_run not in block._forward_hooks.values():
            block.register_forward_hook(_require_run, with_kwargs=True)


def unmark(blocks: Iterable[nn.Module | None]) -> None:
    """Let these be ordinary blocks."""
    for block in blocks:
        hooks = {} if block is None else block._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _require_run]:
            del hooks[key]
            assert block is not None
            block._forward_hooks_with_kwargs.pop(key, None)


def _require_run(block: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
    """Do nothing if the block was not called with what was made of another one's output alone.

    Raises:
        UsageError: It was.
    """
    *kwargs, y = rest  # a block that torch.compile has wrapped is not asked for its keywords
    if type(y) is not Tensor:
        return
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(map(_is_returned, tensors[:1])):
        raise UsageError(
            f"a {block._get_name()} of a momentum run was called with what the block before it"
            " returned, which is the plain network and not the momentum network",
            kind="usage.outside_stage",
            fix="call the whole stage, or take momconv.revert(model) for the plain network",
        )
    if not any(y is x for x in tensors):
        setattr(y, _RETURNED, True)
        if not torch.compiler.is_compiling() and y.grad_fn is not None:
            _notes(y.grad_fn)[_RETURNED] = True


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

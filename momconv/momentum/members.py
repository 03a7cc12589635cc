"""The blocks of runs, which notice when somebody calls them in turn as if there were no run.

``for block in stage: x = block(x)`` would be the plain network, and so would be PyTorch's
``checkpoint_sequential``, ``nn.Sequential(*stage)`` and much that other packages do. In a run no
block ever gets what another one has returned.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from momconv.errors import UsageError

_returned = WeakIdKeyDictionary()  # what members have returned


def mark(blocks: Iterable[nn.Module | None]) -> None:
    """Let these be members of a run."""
    for block in blocks:
        if block is not None and _require_run not in block._forward_hooks.values():
            block.register_forward_hook(_require_run)


def unmark(blocks: Iterable[nn.Module | None]) -> None:
    """Let these be ordinary blocks."""
    for block in blocks:
        hooks = {} if block is None else block._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _require_run]:
            del hooks[key]


def _require_run(block: nn.Module, args: tuple[Any, ...], y: Any) -> None:
    """Do nothing if the block was not called with what another one has returned.

    Raises:
        UsageError: It was.
    """
    if torch.compiler.is_compiling() or type(y) is not Tensor:
        return
    if args and isinstance(args[0], Tensor) and args[0] in _returned:
        raise UsageError(
            f"a {block._get_name()} of a momentum run was called with what the block before it"
            " returned, which is the plain network and not the momentum network",
            kind="usage.outside_stage",
            fix="call the whole stage, or take momconv.revert(model) for the plain network",
        )
    if not (args and y is args[0]):
        _returned[y] = None

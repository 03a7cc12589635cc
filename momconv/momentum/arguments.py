"""Blocks that are called with more than tensors: by keywords, or with numbers, flags or None.

All that runs a block knows tensors alone. What else a call has is the same for every block of a
sequence, and is bound to the block before.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


def bind(
    blocks: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Modules that do what ``blocks`` do if called with x and the returned tensors.

    Args:
        blocks: They are called with x, ``args`` and ``kwargs``.
        args: Tensors and anything else, also inside tuples, lists and dictionaries.
        kwargs: The same by name.
    """
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):
        return [*blocks], args
    leaves, structure = tree_flatten((args, kwargs))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    places = [n for n, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    return [_Bound(block, constants, places, structure) for block in blocks], tensors


class _Bound(nn.Module):
    """A block with the arguments that are no tensors; it has the block's name in errors."""

    def __init__(
        self, block: nn.Module, constants: list[Any], places: list[int], structure: TreeSpec
    ) -> None:
        super().__init__()
        self.block = block
        self._constants = constants  # in the places of tensors None
        self._places = places
        self._structure = structure

    def forward(self, x: Tensor, *tensors: Tensor) -> Any:
        leaves = [*self._constants]
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._structure)
        return self.block(x, *args, **kwargs)

    def _get_name(self) -> str:
        return str(self.block._get_name())

"""Blocks that are called with more than tensors: by keywords, or with numbers, flags or None.

All that runs a block knows tensors alone, the same for every block of a sequence. What else a call
has is bound to the block before, and so is which of the tensors are its own.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from momconv.momentum.members import call_block
from momconv.tracing.runs import is_same

Call = tuple[tuple[Any, ...], dict[str, Any]]  # what a block is called with besides x


class Each(NamedTuple):
    """What a stage is called with besides x if each of its blocks has arguments of its own."""

    calls: tuple[Call, ...]


def gather(calls: Sequence[Call]) -> Call:
    """Return what a stage is called with besides x whose blocks are called like this."""
    leaves, structures = zip(*map(tree_flatten, calls), strict=True)
    is_one = all(structure == structures[0] for structure in structures) and all(
        all(map(is_same, leaves[0], others)) for others in leaves
    )
    return calls[0] if is_one else ((Each(tuple(calls)),), {})


def bind(
    blocks: Sequence[nn.Module], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[nn.Module], tuple[Tensor, ...]]:
    """Return modules that do what ``blocks`` do, to be called with x and the tensors returned.

    Args:
        blocks: They are called with x, ``args`` and ``kwargs``.
        args: Tensors and anything else, also inside tuples, lists and dictionaries; or
            :class:`Each`.
        kwargs: The same by name.
    """
    if not kwargs and all(isinstance(arg, Tensor) for arg in args):
        return [*blocks], args
    has_own = len(args) == 1 and isinstance(args[0], Each)
    calls = args[0].calls if has_own else ((args, kwargs),) * len(blocks)
    leaves = [leaf for leaf in tree_leaves(calls) if isinstance(leaf, Tensor)]
    tensors = [*{id(leaf): leaf for leaf in leaves}.values()]
    bound = [_Bound(*pair, tensors) for pair in zip(blocks, calls, strict=True)]
    return [*bound], tuple(tensors)


class _Bound(nn.Module):
    """A block with the arguments that are no tensors; it has the block's name in errors."""

    def __init__(self, block: nn.Module, call: Call, tensors: Sequence[Tensor]) -> None:
        """``tensors`` are those that it is going to be called with, by places among them."""
        super().__init__()
        self.block = block
        leaves, self._structure = tree_flatten(call)
        places = {id(tensor): place for place, tensor in enumerate(tensors)}
        self._places = {n: places[id(x)] for n, x in enumerate(leaves) if isinstance(x, Tensor)}
        # In the places of tensors None.
        self._constants = [None if n in self._places else leaf for n, leaf in enumerate(leaves)]

    def forward(self, x: Tensor, *tensors: Tensor) -> Any:
        leaves = [*self._constants]
        for n, place in self._places.items():
            leaves[n] = tensors[place]
        args, kwargs = tree_unflatten(leaves, self._structure)
        return call_block(self.block, x, *args, **kwargs)

    def _get_name(self) -> str:
        return str(self.block._get_name())

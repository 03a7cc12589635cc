"""Where a block that is repeated in two parts is cut.

Backward asks for the last tensors first. So such a block is repeated twice: for the tensors from
the first of its largest on, such as the hidden layer of an MLP, and, when backward has used these
up, for those before it, such as what attention saved. What one operation saves stays together.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Cut:
    """Watches what a block's first call saves for backward.

    ``kept`` are tensors that exist anyway, such as weights; saving them takes no memory.
    """

    def __init__(self, kept: Iterable[Tensor]) -> None:
        self._kept = {*map(_memory_of, kept)}
        self._sizes: list[int] = []  # bytes of what is saved
        self._operations: list[int] = []  # which save it, by numbers that grow

    def note(self, tensor: Tensor) -> None:
        """Take notice of the tensor that is saved next."""
        is_sparse = tensor.layout != torch.strided  # as of a graph, which exists anyway
        is_kept = is_sparse or _memory_of(tensor) in self._kept
        self._sizes.append(0 if is_kept else tensor.nbytes)
        # What a compiled function saves, it saves as one operation.
        is_compiled = torch.compiler.is_dynamo_compiling()
        self._operations.append(0 if is_compiled else torch._C._autograd._get_sequence_nr())

    def find_middle(self, little: int) -> int:
        """Return how many tensors are saved before the operation that saves the first largest.

        0, for no cut, if these are no more than ``little`` bytes.
        """
        largest = self._sizes.index(max(self._sizes)) if self._sizes else 0
        middle = self._operations.index(self._operations[largest]) if self._sizes else 0
        return middle if sum(self._sizes[:middle]) > little else 0


def _memory_of(tensor: Tensor) -> int:
    """Return a number that tensors share if they share memory, and both exist."""
    number: int = tensor.untyped_storage()._cdata
    return number

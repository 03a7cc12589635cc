"""A checksum of a safetensors file: of all its tensors and metadata, in the metadata themselves."""

import hashlib
import json
import operator
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, uint8

KEY = "momconv.checksum"


def find_misspelt(keys: Iterable[str]) -> str | None:
    """Return the one of ``keys`` that differs from the checksum's in a single character.

    >>> find_misspelt(["format", "momconv.version", "momconv.chEcksum"])
    'momconv.chEcksum'
    """
    alike = (key for key in keys if len(key) == len(KEY))
    return next((key for key in alike if sum(map(operator.ne, key, KEY)) == 1), None)


def compute(metadata: Mapping[str, str], keys: Iterable[str], read: Callable[[str], Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of ``metadata`` and the tensors that ``read`` gives.

    Args:
        metadata: All of the file; a checksum among them is passed over.
        keys: The names of the tensors, in any order.
        read: The tensor of a name, contiguous and on the CPU.
    """
    texts = sorted((key, value) for key, value in metadata.items() if key != KEY)
    digest = hashlib.sha256(json.dumps(texts).encode())
    for key in sorted(keys):
        tensor = read(key)
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().data)
    return digest.hexdigest()

"""Writing safetensors files with a checksum.

The library's own writer leaves files behind when it is killed, keeps them from others than their
owner, and holds all bytes once more in memory.
"""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from momconv.zoo import checksum


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write ``tensors``, on any device, and ``metadata`` with their checksum, to ``path``.

    Two calls write the same bytes.

    Raises:
        OSError: It cannot be written.
    """
    # A copy for channels_last weights; the others are passed through.
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    digest = checksum.compute(metadata, plain, plain.__getitem__)
    header: dict[str, object] = {"__metadata__": {**metadata, checksum.KEY: digest}}
    # The largest numbers come first, so that each begins at a multiple of its size.
    order = sorted(plain, key=lambda key: (-plain[key].element_size(), key))
    end = 0
    for key in order:
        begin, end = end, end + plain[key].nbytes
        shape, kind = list(plain[key].shape), _name(plain[key].dtype)
        header[key] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(plain[key].reshape(-1).view(torch.uint8).numpy().data)


@cache
def _name(dtype: torch.dtype) -> str:
    """Return what the format calls ``dtype``."""
    written = safetensors.torch.save({"": torch.empty(0, dtype=dtype)})
    name: str = json.loads(written[8:])[""]["dtype"]
    return name

"""The same numbers each time on a GPU too, at the price of speed."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FIRST_WITH_TF32 = (8, 0)  # compute capability


@contextmanager
def deterministic(*, wanted: bool) -> Iterator[None]:
    """PyTorch chooses deterministic algorithms inside, and warns where it has none, if ``wanted``.

    https://docs.pytorch.org/docs/stable/notes/randomness.html; on a CPU runs repeat bit for bit
    without it.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads it when it starts; without, it may take another algorithm each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, searching = torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark
    torch.set_deterministic_debug_mode("warn")
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
        torch.backends.cudnn.benchmark = searching


def describe_tf32(device: torch.device) -> str:
    """Return where the GPU rounds the factors of products in fp32 to 11 bits, as newer ones can."""
    settings = {  # allow_tf32 raises where these were set
        "convolutions": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        "linear layers": torch.backends.cuda.matmul,
    }
    places = [name for name, backend in settings.items() if backend.fp32_precision == "tf32"]
    can = torch.cuda.get_device_capability(device) >= _FIRST_WITH_TF32
    return f"TF32 in {' and '.join(places)}" if can and places else "fp32 throughout"

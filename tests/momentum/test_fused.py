"""The Triton kernels, run by Triton's interpreter, against the path without Triton."""

import importlib
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import Tensor

from momconv.momentum import kernels
from momconv.momentum.equations import Rule

ULP = 2.0**-14
SIZE = 2500  # two programs and a part of one


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    pytest.importorskip("triton", reason="Triton is for GPUs")
    module = importlib.import_module("momconv.momentum.fused")
    with monkeypatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read by @triton.jit
        yield importlib.reload(module)
    importlib.reload(module)


def state(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SIZE).div(ULP).round().mul(ULP)
    v = torch.randn(SIZE).div(ULP).round()
    r = torch.randint(-100, 100, (SIZE,)).to(torch.int16)
    y = torch.randn(SIZE).to(dtype)
    y[:3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    # Residuals halfway between two integers, of either sign, go to the even one.
    y[4:20] = x[4:20] + (torch.arange(-8, 8) + 0.5) * ULP * 4
    return x, v, r, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, at the non-finite values
def test_the_kernels_compute_the_same_bits(
    fused: ModuleType, gamma: float, dtype: torch.dtype
) -> None:
    rule = Rule(gamma, (0.25,), ULP)
    x, v, r, y = state(dtype)
    ours, theirs = ([v.clone(), r.clone()] for _ in range(2))
    if gamma == 1:
        del ours[1], theirs[1]

    x_ours = fused.advance(x, *pad(ours), y, rule, 0)
    x_theirs = kernels.advance(x, *pad(theirs), y, rule, 0)

    assert torch.equal(x_ours.nan_to_num(), x_theirs.nan_to_num())
    finite = x_theirs.isfinite()
    assert all(torch.equal(a[finite], b[finite]) for a, b in zip(ours, theirs, strict=True))
    assert torch.equal(x_ours.isnan(), x_theirs.isnan())

    fused.undo(x, *pad(ours), y, rule, 0)

    before = (v, r)
    assert all(torch.equal(a[finite], b[finite]) for a, b in zip(ours, before, strict=False))


def pad(state: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    v, *rest = state
    return v, rest[0] if rest else None

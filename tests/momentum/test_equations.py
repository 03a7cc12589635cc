"""The rule, its inverse, and the in-place twins of both."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momconv.momentum.equations import (
    FULL,
    Block,
    Rule,
    coefficients,
    divide,
    integrate,
    multiply,
    remainder_bounds,
    reverse,
    step,
    weights,
)
from momconv.momentum.faster import fused, kernels

GAMMAS = [0.001, 0.1, 0.5, 0.9, 0.99, 1.0]
ULP = 2.0**-14
gammas = st.one_of(st.sampled_from(GAMMAS), st.floats(1e-4, 1.0))


def on_grid(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).div(ULP).round().mul(ULP)


def residual(n: int) -> Block:
    return lambda x: x + torch.sin(x * (1 + n))


def residuals(depth: int) -> list[Block]:
    return [residual(n) for n in range(depth)]


@given(gamma=gammas, seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1.0, 2.0**10, 2.0**21]))
def test_dividing_undoes_multiplying_bit_by_bit(gamma: float, seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(1000, generator=generator).mul(size / 8).round()
    r = (
        torch.randint(-FULL, FULL, (1000,), generator=generator)
        .float()
        .mul(min(1, 50 * gamma))
        .round()
    )

    scaled = multiply(v, r, gamma)

    assert all(map(torch.equal, divide(*scaled, gamma), (v, r)))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_multiplying_is_accurate_to_one_grid_unit(gamma: float) -> None:
    v = torch.arange(-(2.0**14), 2.0**14)

    scaled, remainder = multiply(v, torch.zeros_like(v), gamma)

    assert (scaled.double() - v.double() * gamma).abs().max() <= (1 + gamma) / 2 + 0.01
    assert remainder.abs().max() <= next(remainder_bounds(gamma, 1))[1]


@settings(deadline=None, max_examples=30)
@given(gamma=gammas, depth=st.integers(1, 60), seed=st.integers(0, 1000))
def test_the_reversed_loop_arrives_where_the_loop_began(
    gamma: float, depth: int, seed: int
) -> None:
    x0 = on_grid(200, seed=seed)
    rule = Rule(gamma, coefficients(gamma, [1.0] * depth, "zero"), ULP)

    x, v, remainders = integrate(x0, residuals(depth), rule)
    x, v, remainders = reverse(x, v, remainders, residuals(depth), rule)

    assert torch.equal(x, x0)
    assert not v.any()
    assert not any(r.any() for r in remainders)


def test_with_a_wrong_gamma_the_loop_does_not_come_back() -> None:
    x0, blocks = on_grid(200), residuals(5)
    rule = Rule(0.9, coefficients(0.9, [1.0] * 5, "zero"), ULP)
    wrong = Rule(0.8, rule.coefficients, ULP)

    x, v, _ = reverse(*integrate(x0, blocks, rule), blocks, wrong)

    assert not torch.equal(x, x0)
    assert v.any()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_side_information_is_log2_of_one_over_gamma_bits_a_block(gamma: float) -> None:
    # Section 3.2 of the paper. The constant is the first block's.
    depth = 12
    rule = Rule(gamma, coefficients(gamma, [1.0] * depth, "zero"), ULP)
    _, _, (r,) = integrate(on_grid(4096), residuals(depth), rule)

    bits = math.log2(r.abs().max().item())

    assert abs(bits - depth * math.log2(1 / gamma)) < 3


@pytest.mark.parametrize("gamma", GAMMAS)
def test_no_remainder_exceeds_its_bound_over_1000_blocks(gamma: float) -> None:
    # With v as unfavourable as a random walk in steps of the largest residual can make it.
    generator = torch.Generator().manual_seed(0)
    v, r = torch.zeros(500), torch.zeros(500)
    bounds = list(remainder_bounds(gamma, 1000))
    for is_full, bound in bounds:
        r = torch.zeros_like(r) if is_full else r
        v, r = multiply(v, r, gamma)
        v = v + torch.randint(-(2**18), 2**18, (500,), generator=generator)
        v = v.clamp(-(2**22), 2**22)
        assert r.abs().max() <= bound
    assert all(bound <= FULL for _, bound in bounds)


@pytest.mark.parametrize("gamma", [0.1, 0.9, 0.99])
def test_the_bound_on_the_remainder_is_not_far_from_the_truth(gamma: float) -> None:
    v, r = torch.randint(-(2**18), 2**18, (5000,)).float(), torch.zeros(5000)
    *_, (_, bound) = remainder_bounds(gamma, 4)
    for _ in range(4):
        v, r = multiply(v, r, gamma)

    assert r.abs().max() > bound / 6


def test_starting_with_the_first_residual_is_a_larger_first_coefficient() -> None:
    # v[0] = f(x[0]): the first step is then γ f + (1 − γ) f = f.
    assert coefficients(0.9, [1.0, 1.0], "residual") == pytest.approx((1.0, 0.1))
    assert coefficients(0.9, [1.0, 1.0], "zero") == pytest.approx((0.1, 0.1))
    assert coefficients(1.0, [1.0, 1.0], "residual") == (2.0, 1.0)  # v = f, then v + f


def test_weights_are_those_of_the_unrolled_recurrence() -> None:
    # Section 4 of the design: block j of k contributes 1 − γ^(k−j) of its residual.
    steps = coefficients(0.9, [1.0] * 4, "zero")

    assert weights(0.9, steps) == pytest.approx([1 - 0.9**k for k in (4, 3, 2, 1)])


@pytest.mark.parametrize("may_fuse", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_in_place_kernels_compute_the_equations(
    monkeypatch: pytest.MonkeyPatch,
    gamma: float,
    layout: torch.memory_format,
    dtype: torch.dtype,
    *,
    may_fuse: bool,
) -> None:
    if not may_fuse:
        monkeypatch.setattr(fused, "are_for", lambda x, y: False)
    shape = (3, 7, 80, 81)  # more than one piece, the last one shorter
    assert math.prod(shape) > kernels.PIECE
    x, y = (on_grid(*shape, seed=s).to(dtype).to(memory_format=layout) for s in (1, 2))
    v = (on_grid(*shape, seed=3) / ULP).to(dtype).to(memory_format=layout)
    bound = 100 if gamma > 0.05 else 5
    r = torch.randint(-bound, bound, shape).to(torch.int16).to(memory_format=layout)
    rule = Rule(gamma, (0.3,), ULP)
    expected = step(x, v, r.to(dtype), lambda _: y, rule, 0)
    v_after, r_after = v.clone(), r.clone()

    largest = x.new_zeros(())
    r_or_none = None if gamma == 1 else r_after
    x_after = kernels.advance(x, v_after, r_or_none, y, largest, rule, 0)
    assert all(map(torch.equal, (x_after, v_after, r_after.to(dtype)), expected))

    x_back = x_after - v_after * ULP
    kernels.undo(x_back, v_after, None if gamma == 1 else r_after, y, rule, 0)
    assert all(map(torch.equal, (x_back, v_after, r_after), (x, v, r)))

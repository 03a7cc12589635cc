"""The rule, its inverse, and the in-place twins of both."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from momconv.momentum.equations import (
    BITS,
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
    to_grid,
    weights,
)
from momconv.momentum.faster import fused, kernels
from momconv.momentum.measures import no_magnitudes
from momconv.momentum.storage import State

GAMMAS = [0.001, 0.1, 0.5, 0.9, 0.99, 1.0]
EXPONENT = 5
gammas = st.one_of(st.sampled_from(GAMMAS), st.floats(1e-4, 1.0))


def make_rule(gamma: float, depth: int, dtype: torch.dtype = torch.float32) -> Rule:
    return Rule.of(gamma, coefficients(gamma, [1.0] * depth, "zero"), EXPONENT, dtype)


def on_grid(*shape: int, rule: Rule, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return to_grid(torch.randn(*shape, generator=generator, dtype=torch.double), rule.ulp)


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
    rule = make_rule(gamma, depth)
    x0 = on_grid(200, rule=rule, seed=seed)

    x, v, remainders = integrate(x0, residuals(depth), rule)
    x, v, remainders = reverse(x, v, remainders, residuals(depth), rule)

    assert torch.equal(x, x0)
    assert not v.any()
    assert not any(r.any() for r in remainders)


def test_with_a_wrong_gamma_the_loop_does_not_come_back() -> None:
    rule, blocks = make_rule(0.9, 5), residuals(5)
    x0, wrong = on_grid(200, rule=rule), replace(rule, gamma=0.8)

    x, v, _ = reverse(*integrate(x0, blocks, rule), blocks, wrong)

    assert not torch.equal(x, x0)
    assert v.any()


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_the_side_information_is_log2_of_one_over_gamma_bits_a_block(gamma: float) -> None:
    # Section 3.2 of the paper. The constant is the first block's.
    depth = 12
    rule = make_rule(gamma, depth)
    _, _, (r,) = integrate(on_grid(4096, rule=rule), residuals(depth), rule)

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
def test_the_kernels_compute_the_equations_on_a_stored_state(
    monkeypatch: pytest.MonkeyPatch,
    gamma: float,
    layout: torch.memory_format,
    dtype: torch.dtype,
    *,
    may_fuse: bool,
) -> None:
    if not may_fuse:
        monkeypatch.setattr(fused, "are_for", lambda x, y: False)
    shape = (3, 7, 60, 61)  # more than one piece, the last one shorter
    assert math.prod(shape) > kernels.PIECE
    rule = Rule.of(gamma, (0.3,) * 12, EXPONENT, dtype)
    state = make_state(rule, shape, layout)
    y = torch.randn(*shape).to(dtype).to(memory_format=layout)
    before = state.unpack(rule)
    expected = step(*before, lambda _: y, rule, 0)
    largest = no_magnitudes(y)

    state.x = kernels.advance(state, y, largest, rule, 0)

    assert all(map(torch.equal, state.unpack(rule), expected))
    assert largest[0] == max(expected[0].abs().max(), expected[1].abs().max() * rule.ulp).to(dtype)
    assert largest[1] == 0
    state.x = kernels.retreat(state, rule)
    kernels.undo(state, y, rule, 0)
    assert all(map(torch.equal, state.unpack(rule), before))


def make_state(rule: Rule, shape: tuple[int, ...], layout: torch.memory_format) -> State:
    x = torch.empty(shape, dtype=rule.dtype).to(memory_format=layout)
    state = State.start(x, rule, is_reversible=True)
    if state.r is not None:
        state.r = state.r.to(torch.int16)
    bound = 100 if rule.gamma > 0.05 else 5
    r = torch.randint(-bound, bound, shape).double()
    v = (torch.randn(*shape).double() / (16 * rule.v_ulp)).round()
    state.x = state.pack(on_grid(*shape, rule=rule, seed=1), v, r, rule).contiguous(
        memory_format=layout
    )
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_is_stored_without_loss_up_to_the_limit_of_its_rule(dtype: torch.dtype) -> None:
    rule = Rule.of(0.9, (0.1,) * 12, EXPONENT, dtype)
    count = 2.0 ** BITS[dtype]
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(10_000, generator=generator, dtype=torch.double) * 2 - 1) * (count - 1)
    x = torch.cat([x.round(), torch.tensor([count - 1, 1 - count, 0, 1, -1], dtype=torch.double)])
    state = State.start(torch.zeros(x.shape, dtype=dtype), rule, is_reversible=True)

    state.x = state.pack(x * rule.ulp, x, torch.zeros_like(x), rule)

    assert state.x.dtype == dtype
    assert all(map(torch.equal, state.unpack(rule), (x * rule.ulp, x, torch.zeros_like(x))))

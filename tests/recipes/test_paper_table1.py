"""The claims of table 1 (docs/paper.md) that no other test makes."""

import pytest
import torch
from torch import Tensor, nn

from momconv.momentum.equations import Rule, coefficients, integrate, reverse, to_grid


@pytest.mark.parametrize(("lipschitz", "arrives"), [(0.5, True), (2.0, False)])
def test_a_residual_block_is_inverted_by_iteration_only_if_it_contracts(
    lipschitz: float, arrives: bool
) -> None:
    x = torch.linspace(-1, 1, 9, dtype=torch.float64)
    y = x + lipschitz * torch.sin(x)
    inverse = y
    for _ in range(60):
        inverse = y - lipschitz * torch.sin(inverse)
    assert torch.allclose(inverse, x, atol=1e-9) is arrives


def test_an_ode_solved_backwards_does_not_end_exactly_at_its_start() -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")

    def field(t: Tensor, x: Tensor) -> Tensor:
        return torch.sin(3 * x)

    start = torch.linspace(-1, 1, 9, dtype=torch.float64)
    there, back = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])
    options = {"step_size": 0.25}
    end = torchdiffeq.odeint(field, start, there, method="rk4", options=options)[-1]
    again = torchdiffeq.odeint(field, end, back, method="rk4", options=options)[-1]
    assert 1e-6 < (again - start).abs().max() < 1e-1


def test_momentum_ends_exactly_at_its_start_whatever_the_block() -> None:
    blocks = [lambda x: x + 3 * torch.sin(3 * x)] * 20  # far from a contraction
    rule = Rule.of(0.9, coefficients(0.9, [1.0] * 20, "zero"), 5, torch.float64)
    start = to_grid(torch.linspace(-1, 1, 9, dtype=torch.float64), rule.ulp)
    x, v, r = reverse(*integrate(start, blocks, rule), blocks, rule)
    assert torch.equal(x, start)
    assert not v.any()
    assert not any(part.any() for part in r)


def test_an_i_revnet_changes_resolution_without_losing_anything() -> None:
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(nn.PixelShuffle(2)(nn.PixelUnshuffle(2)(images)), images)

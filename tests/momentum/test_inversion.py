"""The inverse by itself."""

from typing import Any

import pytest
import torch
from networks import images, stack
from torch import Tensor, nn

from momconv import MomentumSequential
from momconv.errors import InversionError, UsageError
from momconv.momentum.equations import coefficients


class Shifted(nn.Linear):
    """Takes a further argument."""

    def __init__(self) -> None:
        super().__init__(8, 8)

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return x + torch.tanh(super().forward(x) + shift)


def shifted(depth: int, **options: Any) -> MomentumSequential:
    torch.manual_seed(0)
    return MomentumSequential(*(Shifted() for _ in range(depth)), **options)


@pytest.mark.parametrize("velocity", ["zero", "residual"])
@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
def test_the_state_at_the_end_leads_back_through_all_that_the_blocks_have_read(
    gamma: float, velocity: Any
) -> None:
    net, x = shifted(40, gamma=gamma, velocity=velocity), torch.randn(4, 8)
    read: list[Tensor] = []
    end = net.integrate(x, shift=0.3)
    for block in net:
        block.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    y = net(x, shift=0.3)

    found = net.invert(end, shift=0.3)

    assert torch.equal(end.x.float(), y)
    assert len(found) == 41
    assert all(map(torch.equal, found, [*read[:40], y]))
    torch.testing.assert_close(found[0], x, rtol=0, atol=2.0**-20)


def test_the_state_is_that_of_the_equations() -> None:
    net, x = shifted(6, gamma=0.8), torch.randn(4, 8)
    v, truth = torch.zeros(4, 8).double(), x.double()
    for block, c in zip(
        shifted(6, gamma=0.8).double(), coefficients(0.8, [1] * 6, "zero"), strict=True
    ):
        v = 0.8 * v + c * (block(truth) - truth)
        truth = truth + v

    end = net.integrate(x)

    (run,) = net.runs or ()
    torch.testing.assert_close(end.x, truth, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(end.v * net.rule(run, x.dtype).v_ulp, v, rtol=1e-5, atol=1e-6)


def test_another_state_is_no_end() -> None:
    net = stack(3).eval()
    x, v, remainders = net.integrate(images())
    with pytest.raises(InversionError, match="does not end where a run begins"):
        net.invert((x, v + 1, remainders))
    with pytest.raises(UsageError, match="was given a Tensor, not"):
        net.invert(x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has not seen a pass"):
        stack(3).eval().invert((x, v, remainders))
    with pytest.raises(InversionError, match="not finite"):
        net.invert((x / 0, v, remainders))


def test_only_one_whole_run_can_be_inverted() -> None:
    net = MomentumSequential(nn.Conv2d(8, 8, 1), *stack(3))
    with pytest.raises(UsageError, match="all of one run"):
        net.integrate(images())
    with pytest.raises(UsageError, match="all of one run"):
        stack(3, gamma=0).integrate(images())


class Fixed(nn.Module):
    """Has a buffer and no parameters."""

    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.full((8, 8), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight)


def test_blocks_without_parameters_are_inverted_in_the_precision_of_their_buffers() -> None:
    net, x = MomentumSequential(Fixed(), Fixed()).double(), torch.randn(4, 8).double()

    assert torch.equal(net.invert(end := net.integrate(x))[-1], end.x)

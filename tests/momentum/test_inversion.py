"""The inverse by itself."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import images, stack
from torch import Tensor, nn
from torch.autograd import forward_ad

from momconv import MomentumSequential
from momconv.errors import InversionError, UsageError
from momconv.momentum.equations import coefficients
from momconv.momentum.inversion import EndState


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


def test_nothing_is_left_of_the_way_back() -> None:
    net = stack(3).train()
    end = net.integrate(images())
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [norm.num_batches_tracked.item() for norm in norms] == [1] * 6  # type: ignore[union-attr]
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}

    net.invert(end)
    with pytest.raises(InversionError):
        net.invert(end._replace(v=end.v + 1))

    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())


def test_another_state_is_no_end() -> None:
    net = stack(3).eval()
    end = net.integrate(images())
    with pytest.raises(InversionError, match="does not end where a run begins"):
        net.invert(end._replace(v=end.v + 1))
    with pytest.raises(InversionError, match="does not end where a run begins"):
        stack(3, seed=1).eval().invert(end)
    with pytest.raises(UsageError, match="was given a Tensor, not"):
        net.invert(end.x)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="has not seen a pass"):
        stack(3).eval().invert(end[:3])
    with pytest.raises(InversionError, match="not finite"):
        net.invert(end._replace(x=end.x / 0))


CHANGES: dict[str, Callable[[EndState], EndState]] = {
    "this has 1 and float64 (2, 8) on cpu, float64 (4, 8) on cpu": lambda end: end._replace(
        x=end.x[:2]
    ),
    "this has 1 and float64 (4, 8) on cpu, float32 (4, 8) on cpu": lambda end: end._replace(
        v=end.v.float()
    ),
    "this has 0 and float64 (4, 8) on cpu": lambda end: end._replace(remainders=()),
    "a Shifted does not take what this state leads to, float64 (4, 8) on cpu: mat1 and mat2 must"
    " have the same dtype": lambda end: end._replace(dtype=torch.float64),
    "this state leads to, float32 (4, 3) on cpu: mat1 and mat2 shapes": lambda end: end._replace(
        x=end.x[:, :3], v=end.v[:, :3], remainders=tuple(r[:, :3] for r in end.remainders)
    ),
    "this state leads to, float32 (4, 8) on meta": lambda end: end._replace(
        x=end.x.to("meta"),
        v=end.v.to("meta"),
        remainders=tuple(r.to("meta") for r in end.remainders),
    ),
}


@pytest.mark.parametrize("differs", CHANGES)
def test_a_state_that_cannot_be_of_the_stage_is_refused_for_what_differs(differs: str) -> None:
    net = shifted(3)
    with pytest.raises(UsageError, match=re.escape(differs)):
        net.invert(CHANGES[differs](net.integrate(torch.randn(4, 8))))


@pytest.mark.parametrize(
    ("change", "given"),
    [
        ({"x": None}, "EndState of NoneType, Tensor, Tensor, int, dtype, not"),
        ({"v": None}, "EndState of Tensor, NoneType, Tensor, int, dtype, not"),
        ({"remainders": None}, "EndState of Tensor, Tensor, NoneType, int, dtype, not"),
        ({"exponent": 5000}, "exponent is 5000, not an integer from -95 to 1000"),
        ({"exponent": "8"}, "exponent is '8', not an integer"),
    ],
)
def test_what_is_no_state_is_refused(change: dict[str, Any], given: str) -> None:
    net = shifted(3)
    with pytest.raises(UsageError, match=given):
        net.invert(net.integrate(torch.randn(4, 8))._replace(**change))


def test_the_state_has_no_derivatives() -> None:
    net, x = shifted(3), torch.randn(4, 8)
    net.integrate(x)  # finds the runs
    calls: list[Callable[[], object]] = [
        lambda: torch.func.vmap(lambda x: net.integrate(x).x)(x[:, None]),
        lambda: torch.func.grad(lambda x: net.integrate(x).x.sum())(x),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="integrate needs values"):
            call()
    with forward_ad.dual_level(), pytest.raises(UsageError, match="integrate needs values"):
        net.integrate(x)


class Casting(Shifted):
    """Computes in its own precision whatever it gets."""

    def forward(self, x: Tensor, shift: float = 0.0) -> Tensor:
        return super().forward(x.to(self.weight.dtype), shift).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_blocks_need_not_have_the_type_of_what_they_read(dtype: torch.dtype) -> None:
    net, x = MomentumSequential(Casting(), Casting(), Casting()), torch.randn(4, 8).to(dtype)
    of_autocast, autocast = shifted(3), torch.autocast("cpu", torch.bfloat16)

    found = net.invert(net.integrate(x))

    assert {y.dtype for y in found} == {dtype}
    assert torch.equal(found[-1], net(x))
    if dtype != torch.float64:  # which autocast leaves as it is
        with autocast:
            found = of_autocast.invert(of_autocast.integrate(x))
            assert torch.equal(found[-1], of_autocast(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_has_the_range_of_its_own_pass(dtype: torch.dtype) -> None:
    net, x = shifted(3).to(dtype), torch.randn(4, 8, dtype=dtype)
    small, large = net.integrate(x), net.integrate(1000 * x)

    assert small.exponent
    assert large.exponent
    assert small.exponent < large.exponent
    assert torch.equal(net.invert(small[:3])[0], net.invert(small)[0])  # the stage knows the rest
    assert torch.equal(net.invert(large)[-1], net(1000 * x))
    assert torch.equal(net.invert(small)[-1], small.x.to(dtype))
    assert torch.equal(shifted(3).to(dtype).invert(small)[0], net.invert(small)[0])


def test_of_no_images_there_is_a_state_too() -> None:
    net = shifted(3)
    found = net.invert(net.integrate(torch.randn(0, 8)))
    assert [y.shape for y in found] == [(0, 8)] * 4
    assert torch.equal(net(x := torch.randn(4, 8)), net.integrate(x).x.float())


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

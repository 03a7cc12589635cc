"""The grid is as fine as the activations allow, whatever their size, and nothing is lost for it."""

import copy
import math
from typing import Any, get_args

import pytest
import torch
from networks import Dropping, aftermath, differences, images, square, stack
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from momconv import MomentumSequential, set_strategy
from momconv.errors import RangeOverflow
from momconv.momentum.autograd import Strategy
from momconv.momentum.equations import HEADROOM, coefficients, weights
from momconv.momentum.sequential import Run

GAMMAS = [0.5, 0.9, 0.99, 1.0]
ACCURATE = 1e-6  # an ordinary loop in single precision is off by 1e-7 to 7e-7


class Scaled(nn.Module):
    """The same function at every scale."""

    def __init__(self, scale: float, strength: float = 0.3, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.scale, self.strength = scale, strength * scale

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.b(torch.tanh(self.a(x / self.scale)))
        return x + self.strength * residual


class Doubling(nn.Linear):
    """2 x and a little more."""

    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + (x + 0.1 * super().forward(x))


def make(depth: int, gamma: float, scale: float = 1.0, strength: float = 0.3) -> MomentumSequential:
    torch.manual_seed(0)
    return MomentumSequential(*(Scaled(scale, strength) for _ in range(depth)), gamma=gamma)


def inputs(scale: float = 1.0) -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(1)) * scale


@torch.no_grad()
def error(net: MomentumSequential, x: Tensor) -> float:
    """Of the output, against equation (2) in double precision, as a share of its norm."""
    y = net(x).double()
    (run,) = net.runs or ()
    truth, v = x.double(), torch.zeros_like(x).double()
    steps = coefficients(net.gamma, run.gains, "zero")
    for block, c in zip(copy.deepcopy(net).double()._modules.values(), steps, strict=True):
        assert block is not None
        v = net.gamma * v + c * (block(truth) - truth)
        truth = truth + v
    return float((y - truth).norm() / truth.norm())


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1e-3, 1.0, 1e4, 1e20])
def test_accurate_and_exact_at_every_scale(scale: float, gamma: float) -> None:
    net, x = make(12, gamma, scale), inputs(scale)

    assert error(copy.deepcopy(net), x) < ACCURATE

    def step(net: nn.Module, x: Tensor) -> Tensor:
        return square(net(x) / scale)

    stored, ours = (aftermath(net, x, how, step) for how in ("store", "momentum"))
    assert differences(ours, stored) == []


@pytest.mark.parametrize("gamma", [0.9, 0.999, 1.0])
def test_accurate_at_depth_300(gamma: float) -> None:
    net = make(300, gamma, strength=0.06)
    steps = coefficients(gamma, [1.0] * 300, "zero")
    net.runs = (Run(0, 300, tuple(1 / weight for weight in weights(gamma, steps))),)

    assert error(net, inputs()) < ACCURATE


def test_accurate_where_a_few_channels_are_large() -> None:
    x = inputs()
    x[:, :2] *= 300

    assert error(make(12, 0.9), x) < ACCURATE


def test_under_bf16_the_error_is_that_of_bf16() -> None:
    net, x = make(12, 0.9), inputs()
    y = net(x)

    with torch.autocast("cpu", torch.bfloat16):
        rounded = net(x)

    assert 1e-4 < (rounded - y).norm() / y.norm() < 1e-2


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "segment", "momentum"])
def test_the_first_pass_finds_a_range_for_what_grows(strategy: Any) -> None:
    torch.manual_seed(0)
    runs = [Run(0, 14, (1.0,) * 14)]
    net = MomentumSequential(*(Doubling() for _ in range(14)), gamma=0.5, runs=runs)
    set_strategy(net, strategy)
    x = inputs().requires_grad_()

    y = net(x)

    assert y.abs().max() > 1000 * x.abs().max()
    (run,) = net.runs or ()
    assert run.exponent is not None
    assert y.abs().max() * 2 <= 2**run.exponent
    assert torch.equal(y, net(x))
    assert error(net, inputs()) < 1e-5
    stored = aftermath(net, inputs(), "store", lambda net, x: square(net(x) / 1e4))
    ours = aftermath(net, inputs(), strategy, lambda net, x: square(net(x) / 1e4))
    assert differences(ours, stored) == []


def test_a_first_pass_that_is_done_again_changes_buffers_and_draws_numbers_once() -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(Dropping(), Growing()) for _ in range(3)]
    net = MomentumSequential(*blocks, gamma=0.5, runs=[Run(0, 3, (1.0,) * 3)])
    known = copy.deepcopy(net)
    torch.manual_seed(5)
    y = net(images())
    counts = [int(b) for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    (run,) = net.runs or ()
    known.runs = net.runs

    torch.manual_seed(5)
    again = known(images())

    assert run.exponent is not None
    assert counts == [1, 1, 1]
    assert torch.equal(y, again)
    assert differences(dict(net.named_buffers()), dict(known.named_buffers())) == []


class Growing(nn.Module):
    """Adds large values that depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.scale = nn.BatchNorm2d(8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x / self.scale)
        return x + 1000 * self.scale * normed


class Counting(nn.Module):
    """Multiplies by what grows with each call, in buffers that it puts in the place of others."""

    calls: Tensor
    mean: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", None)

    def forward(self, x: Tensor) -> Tensor:
        size = x.detach().abs().mean(0)
        self.calls = self.calls + 1
        self.mean = size if self.mean is None else 0.9 * self.mean + 0.1 * size
        result: Tensor = x * self.calls / (1 + self.mean / (1 + size))
        return result


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_buffers_that_blocks_replace_change_once_a_pass(strategy: Any) -> None:
    blocks = [nn.Sequential(Scaled(1.0), Counting()) for _ in range(3)]
    runs = [Run(0, 3, (1.0,) * 3)]
    net = MomentumSequential(*blocks, strategy=strategy, runs=runs)
    factors: list[float] = [1.0, 1.0, 1e4, 1.0]
    expected: Tensor | None = None
    for passes, factor in enumerate(factors, 1):
        net.train(passes != 3)
        square(net(inputs(factor)) / factor).backward()
        size = blocks[0][0].forward(inputs(factor)).detach().abs().mean(0)
        expected = size if expected is None else 0.9 * expected + 0.1 * size
        counts = [int(b) for name, b in net.named_buffers() if name.endswith("calls")]
        assert counts == 3 * [passes]
    mean = net.get_buffer("0.1.mean")
    assert expected is not None
    assert torch.allclose(mean, expected)


WAYS = [*get_args(Strategy), "segment:1", "checkpoint:2", "momentum+store:1", "momentum+parts"]


@pytest.mark.parametrize("factor", [1e6, 2.0**-9])
def test_a_pass_that_does_not_fit_the_range_is_done_again_under_every_strategy(
    factor: float,
) -> None:
    torch.manual_seed(0)
    blocks = [nn.Sequential(Dropping(), Growing()) for _ in range(3)]
    net = MomentumSequential(
        nn.Conv2d(8, 8, 1, bias=False), *blocks, gamma=0.9, runs=[Run(1, 4, (1.0,) * 3)]
    )
    square(net(images())).backward()
    (before,) = (run.exponent or 0 for run in net.runs or ())
    found = {}

    def step(net: nn.Module, x: Tensor) -> Tensor:
        for module in net.modules():
            if isinstance(module, Growing):
                module.scale = factor
        loss = square(net(x) / factor)
        runs.append(net.runs)
        return loss

    for way in WAYS:
        runs: list[Any] = []
        found[way] = aftermath(net, images() * factor, {"": way}, step)
        ((after,),) = runs
        assert before - 1 <= after.exponent - round(math.log2(factor)) <= before + 1
    assert [way for way in WAYS if differences(found[way], found["store"])] == []


@pytest.mark.parametrize("strategy", ["store", "momentum"])
def test_a_pass_that_is_done_again_leaves_the_graphs_of_others_and_changes_norms_once(
    strategy: Any,
) -> None:
    net = MomentumSequential(Growing(), Growing(), gamma=0.9, strategy=strategy).eval()
    net.runs = [Run(0, 2, (1.0, 1.0), exponent=12)]
    for module in net.modules():
        module.train(isinstance(module, nn.BatchNorm2d))
    y, z = net(images()), net(1e6 * images())
    assert [run.exponent for run in net.runs or ()] != [12]
    for loss in (square(z), square(y)):
        loss.backward()
    counts = [int(b) for name, b in net.named_buffers() if name.endswith("num_batches_tracked")]
    assert counts == [2, 2]


def test_where_others_take_part_in_a_pass_it_is_not_done_again_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("momconv.momentum.ranging.is_postponing", lambda: True)
    net = stack(4, gamma=0.9)
    square(net(images())).backward()
    (before,) = net.runs or ()
    assert before.exponent is not None
    large = images() * 2.0**before.exponent
    for strategy in get_args(Strategy):
        set_strategy(net, strategy)
        net.runs = (before,)
        with pytest.raises(RangeOverflow, match="its range has been widened") as caught:
            net(large)
        assert caught.value.kind == "inversion.range_overflow"
        (after,) = net.runs
        assert after.exponent is not None
        assert after.exponent >= before.exponent + HEADROOM
    stored, ours = (aftermath(net, large, how) for how in ("store", "momentum"))
    assert differences(ours, stored) == []


def test_a_row_that_is_not_finite_hides_no_other_where_a_pass_cannot_be_done_again() -> None:
    net, x = make(3, 0.9), inputs()
    net(x)
    x[0] = torch.nan

    def step(net: nn.Module, x: Tensor) -> Tensor:
        return square(checkpoint(net, x, use_reentrant=False)[1:])

    step(net, x.requires_grad_())
    with pytest.raises(RangeOverflow, match="its range has been widened"):
        step(net, 1e6 * x)
    stored, ours = (aftermath(net, 1e6 * x.detach(), how, step) for how in ("store", "momentum"))
    assert torch.equal(ours["grad x"][1:], stored["grad x"][1:])


@pytest.mark.parametrize("factor", [1e6, 1e-3, 1e-9])
def test_inference_is_accurate_beyond_the_range_and_leaves_it(factor: float) -> None:
    net, x = MomentumSequential(*(Scaled(1.0) for _ in range(12)), gamma=0.9), inputs()
    square(net(x)).backward()
    runs, y = net.runs, net(x)

    assert error(net, x * factor) < ACCURATE

    assert net.runs == runs
    assert torch.equal(net(x), y)


@pytest.mark.parametrize("factor", [0.1, 0.04, 0.01])
def test_what_is_a_little_smaller_fits(factor: float) -> None:
    net, x = make(12, 0.9), inputs()
    square(net(x)).backward()

    assert error(net, x * factor) < 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_a_row_that_is_not_finite_is_no_matter_to_the_others(factor: float, bad: float) -> None:
    net, x = make(6, 0.9), inputs()
    net(x)
    healthy = x[1:] * factor
    x = torch.cat([torch.full_like(x[:1], bad), healthy])

    def step(net: nn.Module, x: Tensor) -> Tensor:
        y = net(x)
        assert not y[: len(y) - len(healthy)].isfinite().any()
        return square(y[-len(healthy) :] / factor)

    alone = aftermath(net, healthy, "store", step)
    stored = aftermath(net, x, "store", step)
    ours = aftermath(net, x, "momentum", step)

    assert torch.equal(ours["loss"], stored["loss"])
    assert torch.equal(ours["grad x"][1:], stored["grad x"][1:])
    assert torch.equal(ours["loss"], alone["loss"])
    assert torch.allclose(ours["grad x"][1:], alone["grad x"], rtol=1e-5, atol=0)


class Multiplying(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 1e9 * x


@pytest.mark.parametrize("strategy", ["store", "momentum"])
def test_what_grows_beyond_all_numbers_comes_out_so(strategy: Any) -> None:
    blocks = [Multiplying() for _ in range(6)]
    net = MomentumSequential(*blocks, strategy=strategy, runs=[Run(0, 6, (1.0,) * 6)])
    assert not net(torch.ones(2, 16, requires_grad=True)).isfinite().any()


def test_nothing_is_recorded_where_nothing_is_seen() -> None:
    net = MomentumSequential(*(nn.Sequential(Scaled(1.0)) for _ in range(3)))
    for x in (torch.zeros(2, 16), torch.full((2, 16), torch.nan), torch.zeros(0, 16)):
        net(x)
        assert [run.exponent for run in net.runs or ()] == [None]
    net(inputs())
    assert [run.exponent is None for run in net.runs or ()] == [False]

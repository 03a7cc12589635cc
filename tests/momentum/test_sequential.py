"""MomentumSequential as a module, and the errors of its backward pass."""

import copy
import gc
import pickle
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from networks import (
    Dropping,
    Scaled,
    aftermath,
    differences,
    gradient_of,
    images,
    square,
    stack,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torchvision.models.resnet import BasicBlock

from momconv import MomentumSequential, set_strategy
from momconv.errors import InversionError, NotReproducible, UsageError
from momconv.momentum.autograd import Strategy
from momconv.momentum.sequential import Run


def spans(net: MomentumSequential) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in net.runs or ()]


def test_state_dict_keys_are_those_of_a_sequential() -> None:
    blocks = [BasicBlock(8, 8) for _ in range(3)]

    assert (
        MomentumSequential(*blocks).state_dict().keys()
        == nn.Sequential(*blocks).state_dict().keys()
    )


def test_names_of_an_ordered_dict_are_kept() -> None:
    net = MomentumSequential(OrderedDict(first=BasicBlock(8, 8), second=BasicBlock(8, 8)))

    assert [name for name, _ in net.named_children()] == ["first", "second"]
    assert isinstance(net[:1], nn.Sequential)
    assert [name for name, _ in net[:1].named_children()] == ["first"]


def test_gamma_0_is_the_plain_network() -> None:
    net = stack(4, gamma=0)
    plain = nn.Sequential(*copy.deepcopy(list(net)))

    assert torch.equal(net(images()), plain(images()))


def test_one_step_follows_the_equation() -> None:
    net = stack(2, gamma=0.9).eval()
    x = images()
    first, second = net
    v1 = 0.1 * (first(x) - x)
    x1 = x + v1
    x2 = x1 + 0.9 * v1 + 0.1 * (second(x1) - x1)

    torch.testing.assert_close(net(x), x2, rtol=0, atol=20 * 2**-14)


def test_gains_scale_the_residuals() -> None:
    net = stack(2, gamma=0.9).eval()
    net.runs = (Run(0, 2, (3.0, 5.0)),)
    x = images()
    first, second = net
    v1 = 0.3 * (first(x) - x)
    x1 = x + v1

    expected = x1 + 0.9 * v1 + 0.5 * (second(x1) - x1)

    torch.testing.assert_close(net(x), expected, rtol=0, atol=20 * 2**-14)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_computes_the_same(clone: Any) -> None:
    net = stack(3, gamma=0.7, velocity="residual").eval()
    net(images())

    other = clone(net)

    assert torch.equal(other(images()), net(images()))
    assert other.extra_repr() == net.extra_repr()


@pytest.mark.parametrize("gamma", [-0.1, 1.1, 1e-9, float("nan")])
def test_an_impossible_gamma_is_refused(gamma: float) -> None:
    with pytest.raises(UsageError, match=str(gamma)) as caught:
        stack(2, gamma=gamma)
    assert caught.value.fix


def test_strategies_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="'fastest'"):
        set_strategy(stack(2), "fastest")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no momentum stages"):
        set_strategy(nn.Sequential(nn.ReLU()), "store")
    with pytest.raises(UsageError, match="gamma is 0"):
        set_strategy(stack(2, gamma=0), "momentum")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strategy", ["store", "checkpoint", "momentum"])
def test_a_non_finite_activation_comes_out_non_finite(value: float, strategy: Any) -> None:
    net = stack(4).eval()
    set_strategy(net, strategy)
    x = images()
    x[1, 2, 3, 4] = value
    x.requires_grad_()

    y = net(x)
    square(y).backward()

    assert not y[1].isfinite().all()
    assert y[0].isfinite().all()
    assert not gradient_of(x).isfinite().all()


class Fickle(nn.Module):
    """A block that computes something else each time."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.sin(x * self.scale + self.calls)


@pytest.mark.parametrize("needs_gradient", [True, False])
def test_a_block_that_is_not_reproducible_is_named(needs_gradient: bool) -> None:
    net = MomentumSequential(*(Fickle() for _ in range(4)))
    x = images().requires_grad_(needs_gradient)

    with pytest.raises(NotReproducible, match="something else"):
        square(net(x)).backward()


class Flipping(Fickle):
    """A block that changes the signs of some channels each time it is called."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        signs = torch.tensor([1.0, (-1) ** self.calls] * 4)
        return (x + torch.sin(x * self.scale)) * signs


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum"])
@pytest.mark.parametrize("runs", [[], [Run(0, 3, (1.0,) * 3)]], ids=["plain", "run"])
def test_a_block_that_changes_signs_the_second_time_is_named(strategy: Any, runs: Any) -> None:
    net = MomentumSequential(Scaled(), Flipping(), Scaled(), runs=runs, strategy=strategy)

    with pytest.raises(NotReproducible, match="computed something else"):
        square(net(images(side=8))).backward()

    changed = {name for name, p in net.named_parameters() if p.grad is not None}
    assert changed <= {"2.scale"}


class Negated(Scaled):
    """A block whose output PyTorch has still to negate."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch._neg_view(-super().forward(x))
        assert y.is_neg()
        return y


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum"])
@pytest.mark.parametrize("runs", [[], [Run(0, 3, (1.0,) * 3)]], ids=["plain", "run"])
def test_a_block_may_return_what_is_still_to_be_negated(strategy: Any, runs: Any) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(Negated() for _ in range(3)), runs=runs)

    expected = aftermath(net, images(), "store")

    assert differences(aftermath(net, images(), strategy), expected) == []


def test_a_block_that_saves_other_tensors_the_second_time_is_named() -> None:
    class Changing(Fickle):
        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + (x * self.scale if self.calls < 2 else torch.sin(torch.exp(x)))

    net = MomentumSequential(Changing(), Scaled())

    with pytest.raises(NotReproducible, match="a Changing saved"):
        square(net(images())).backward()


def test_a_second_backward_is_possible_where_inputs_are_kept() -> None:
    net = stack(3)
    set_strategy(net, "checkpoint")
    loss = square(net(images()))
    loss.backward(retain_graph=True)
    once = [gradient_of(parameter).clone() for parameter in net.parameters()]

    loss.backward()

    twice = [gradient_of(parameter) for parameter in net.parameters()]
    assert all(torch.equal(b, a + a) for a, b in zip(once, twice, strict=True))


def test_a_second_backward_over_a_momentum_run_explains_itself() -> None:
    loss = square(stack(3)(images()))
    loss.backward(retain_graph=True)

    with pytest.raises(InversionError) as caught:
        loss.backward()

    assert "store" in (caught.value.fix or "")


def test_writing_into_the_output_is_named() -> None:
    net = stack(3)
    y = net(images())
    y.mul_(2)

    with pytest.raises(InversionError, match="modified in place"):
        square(y).backward()


def test_the_output_survives_backward() -> None:
    net = stack(5)
    y = net(images())
    before = y.detach().clone()

    square(y).backward()

    assert torch.equal(y, before)


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "momentum"])
def test_a_block_that_writes_into_its_input_is_named(strategy: Any) -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu_() + torch.sin(x)

    net = MomentumSequential(Writing(), Writing())
    net.strategy = strategy

    with pytest.raises(UsageError, match="a Writing modifies its input"):
        net(images())


def test_gradients_of_the_last_blocks_alone_can_be_asked_for() -> None:
    gradients = []
    strategies: list[Strategy] = ["store", "momentum"]
    for strategy in strategies:
        net = stack(6)
        net.strategy = strategy
        gradients.append(torch.autograd.grad(square(net(images())), list(net[4].parameters())))

    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "momentum"])
def test_gradients_arrive_block_by_block_during_backward(strategy: Any) -> None:
    # So that an optimiser step inside backward can use and free them.
    net = stack(4)
    set_strategy(net, strategy)
    order: list[int] = []
    for n in range(4):
        weight = net.get_parameter(f"{n}.conv1.weight")
        weight.register_post_accumulate_grad_hook(lambda _, n=n: order.append(n))

    square(net(images())).backward()

    assert order == [3, 2, 1, 0]


class Shifted(nn.Linear):
    """Has two names for a layer, and a tensor that is no buffer; neither may be touched."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.inner = nn.Linear(4, 4)
        self.same = self.inner
        self.shift = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(super().forward(self.same(self.inner(x)))) + self.shift


def test_one_block_at_every_place_is_a_run_and_stays_what_it_is() -> None:
    torch.manual_seed(0)
    block, x = Shifted(), torch.randn(2, 4)
    expected = block(x)
    net = MomentumSequential(*[block] * 3, gamma=0.5)
    assert [(run.start, run.stop) for run in net.find_runs(x)] == [(0, 3)]
    assert torch.equal(block(x), expected)


class Guided(nn.Module):
    """A block that wants tensors inside a tuple and by name, a flag, and perhaps nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, x: Tensor, size: tuple[int, Tensor], *, scale: Tensor, flag: bool, mask: Tensor | None
    ) -> Tensor:
        y = torch.tanh(self.layer(x) * scale + size[1]) / size[0]
        return x + y if flag and mask is None else x


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum", "auto"])
def test_further_arguments_of_any_kind_reach_the_blocks_and_get_their_gradients(
    strategy: Any,
) -> None:
    torch.manual_seed(0)
    net, x = MomentumSequential(*(Guided() for _ in range(4))), torch.randn(3, 4)

    def gradients(strategy: Any) -> list[Tensor]:
        set_strategy(net, strategy)
        net.zero_grad()
        scale, shift = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
        square(net(x, (2, shift), scale=scale, flag=True, mask=None)).backward()
        return [gradient_of(tensor) for tensor in (scale, shift, *net.parameters())]

    assert all(map(torch.equal, gradients(strategy), gradients("store")))
    assert [(run.start, run.stop) for run in net.runs or ()] == [(0, 4)]


def test_an_error_names_the_block_that_is_called_by_keyword() -> None:
    class Writing(nn.Module):
        def forward(self, x: Tensor, *, flag: bool) -> Tensor:
            return x.relu_() + torch.sin(x)

    with pytest.raises(UsageError, match="a Writing modifies its input"):
        MomentumSequential(Writing(), Writing())(images(), flag=True)


@pytest.mark.parametrize("retain", [False, True])
def test_a_random_state_is_kept_as_long_as_backward_may_want_it(retain: bool) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(Dropping(), Dropping(), strategy="checkpoint")
    states = count_random_states()
    loss = square(net(images()))
    assert count_random_states() == states + 2
    loss.backward(retain_graph=retain)
    assert count_random_states() == states + (2 if retain else 0)


def count_random_states() -> int:
    size = torch.get_rng_state().numel()
    found = (each for each in gc.get_objects() if type(each) is Tensor)
    return sum(each.dtype == torch.uint8 and each.numel() == size for each in found)


class Counting(nn.Module):
    """A block whose BatchNorm averages over all batches, which it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.layer(x))
        return x + y


def test_blocks_that_depend_on_values_need_to_be_told_their_runs() -> None:
    torch.manual_seed(0)
    blocks, x = [Counting() for _ in range(3)], images()[:, :4]
    with pytest.raises(UsageError, match="depends on values") as refused:
        MomentumSequential(*blocks)(x)
    assert refused.value.fix == "runs=[Run(0, 3, (1.0,) * 3)], with the bounds of each run"

    net = MomentumSequential(*blocks, runs=[Run(0, 3, (1.0,) * 3)])
    stored, ours = (aftermath(net, x, how) for how in ("store", "momentum"))

    assert differences(ours, stored) == []


class Outside(Scaled):
    """A block that computes something outside PyTorch."""

    def __init__(self, compute: Any) -> None:
        super().__init__()
        self.compute = compute
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(F.dropout(x))) * float(self.compute(x.detach()))


@pytest.mark.parametrize(
    "compute",
    [lambda x: x.numpy().ndim, lambda x: np.asarray(x).max(), lambda x: np.tanh(x.numpy()).sum()],
)
def test_blocks_that_need_numpy_need_to_be_told_their_runs(compute: Any) -> None:
    blocks = [Outside(compute), Outside(compute)]
    before, random = copy.deepcopy(blocks[0].state_dict()), torch.get_rng_state()
    with pytest.raises(UsageError, match="depends on values") as refused:
        MomentumSequential(*blocks)(images())
    assert refused.value.fix == "runs=[Run(0, 2, (1.0,) * 2)], with the bounds of each run"
    assert all(torch.equal(value, before[key]) for key, value in blocks[0].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    MomentumSequential(*blocks, runs=[Run(0, 2, (1.0, 1.0))])(images()).sum().backward()


def test_what_blocks_cannot_take_in_any_case_is_their_own_error() -> None:
    blocks = [Outside(lambda x: x.numpy()["one"]), Outside(lambda x: x.sum(axis="c"))]
    for n, kind in enumerate((IndexError, TypeError)):
        with pytest.raises(kind):
            MomentumSequential(blocks[n], blocks[n])(images())


class Shrinking(nn.Linear):
    """In evaluation, it drops half of what it gets."""

    def forward(self, x: Tensor) -> Tensor:
        y = x + super().forward(x).tanh()
        return y if self.training else y[: len(y) // 2]


def test_a_run_has_no_complex_numbers() -> None:
    for strategy in ("store", "momentum"):
        net = MomentumSequential(nn.Identity(), nn.Identity(), runs=[Run(0, 2, (1.0, 1.0))])
        set_strategy(net, strategy)
        with pytest.raises(UsageError, match=r"with torch.complex64, and its grids are of real"):
            net(torch.ones(1, 2, dtype=torch.complex64))


def test_a_block_of_a_run_may_not_change_the_shape() -> None:
    net = MomentumSequential(Shrinking(4, 4), Shrinking(4, 4))
    net(torch.randn(6, 4))
    with pytest.raises(UsageError, match=r"returned \(3, 4\) for \(6, 4\)"):
        net.eval()(torch.randn(6, 4))


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("strategy", ["checkpoint", "segment"])
def test_weights_may_not_change_between_two_backward_passes(
    strategy: Strategy, *, in_parts: bool
) -> None:
    net = stack(3, strategy=strategy, in_parts=in_parts)
    y = net(images())
    y.sum().backward(retain_graph=True)
    _descend(net)
    with pytest.raises(InversionError, match="modified in place before backward"):
        y.sum().backward()


@torch.no_grad()
def _descend(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.sub_(gradient_of(parameter))


class Tied(nn.Linear):
    """Uses its weight twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(torch.tanh(super().forward(x)))


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum"])
def test_weights_that_are_used_twice_are_exact_under_autocast(strategy: Strategy) -> None:
    torch.manual_seed(0)
    block, other = Tied(8, 8), Tied(8, 8)
    net, x = MomentumSequential(block, other, block), torch.randn(4, 8)

    def step(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return square(net(x)) + square(net(2 * x))

    stored, ours = (aftermath(net, x, how, step) for how in ("store", strategy))
    assert differences(ours, stored) == []


def test_runs_are_not_looked_for_inside_a_transform() -> None:
    net, x = stack(3).eval(), images()
    with pytest.raises(UsageError, match=r"inside torch\.func"):
        torch.func.vmap(net)(x[:, None])
    net(x)
    assert spans(net) == [(0, 3)]


def test_runs_are_not_looked_for_where_weights_are_no_tensors_of_their_own() -> None:
    net = stack(3)
    weight = net[0].conv1.weight
    net[0].conv1.weight = nn.Parameter(TwoTensor(weight.detach(), weight.detach()))  # as FSDP2's
    with pytest.raises(UsageError, match="inside sharded blocks"):
        net(images())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "bogus"}, "unknown strategy 'bogus'"),
        ({"velocity": "fast"}, "unknown velocity 'fast'"),
        ({"runs": [Run(0, 4, (1.0,) * 4)]}, "there are 3 blocks, and no run"),
        ({"runs": [Run(0, 2, (1.0,))]}, "there are 3 blocks, and no run"),
        ({"runs": [Run(0, 2, (1.0, 0.0))]}, "there are 3 blocks, and no run"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        stack(3, **arguments)

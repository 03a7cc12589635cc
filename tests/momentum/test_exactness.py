"""The promise: every strategy gives the values, gradients and buffers of "store", bit for bit."""

import copy
from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any, get_args

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
    under_bf16_autocast,
)
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from momconv import MomentumSequential, set_strategy
from momconv.errors import InversionError
from momconv.momentum.autograd import Strategy
from momconv.momentum.faster import norms
from momconv.momentum.faster.norms import Norms
from momconv.momentum.replay import Replay
from momconv.momentum.sequential import Run
from momconv.momentum.trajectory import Trajectory

GAMMAS = [0.1, 0.5, 0.9, 0.99, 1.0]
OTHERS: list[Strategy] = [name for name in get_args(Strategy) if name != "store"]

GPU = torch.device("cuda")

in_every_other_way = pytest.mark.parametrize("strategy", OTHERS)


@lru_cache(maxsize=1)  # the strategies of a network follow each other
def prepared(
    depth: int,
    *,
    kind: str = "BasicBlock",
    channels: int = 8,
    side: int = 5,
    training: bool = True,
    **options: Any,
) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A network, images, and what a step leaves behind that stores everything."""
    runs = find_runs(depth, kind, channels, side)
    net = stack(depth, kind=kind, channels=channels, runs=runs, **options).train(training)
    x = images(channels=channels, side=side)
    return net, x, aftermath(net, x, "store")


@cache
def find_runs(depth: int, kind: str, channels: int, side: int) -> tuple[Run, ...]:
    """The runs of all networks that differ in γ, velocity and mode alone."""
    net = stack(depth, kind=kind, channels=channels)
    return net.find_runs(images(channels=channels, side=side))


@in_every_other_way
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("depth", [3, 12])
@pytest.mark.parametrize("kind", ["BasicBlock", "Bottleneck"])
def test_gradients_and_buffers_are_those_of_storing_everything(
    kind: str, depth: int, gamma: float, training: bool, strategy: Strategy
) -> None:
    net, x, stored = prepared(depth, kind=kind, gamma=gamma, training=training)

    assert differences(aftermath(net, x, strategy), stored) == []
    assert len(stored) == 2 * len(list(net.parameters())) + 3  # nothing was left out


@in_every_other_way
@pytest.mark.parametrize("gamma", GAMMAS)
def test_exact_at_depth_200(gamma: float, strategy: Strategy) -> None:
    net, x, stored = prepared(200, channels=4, side=3, gamma=gamma)

    assert differences(aftermath(net, x, strategy), stored) == []


def test_exact_at_depth_1000_with_a_bit_of_side_information_a_block() -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(Scaled() for _ in range(1000)), gamma=0.5)
    net.find_runs(images())

    assert (
        differences(aftermath(net, images(), "momentum"), aftermath(net, images(), "store")) == []
    )


@in_every_other_way
@pytest.mark.parametrize("gamma", GAMMAS)
def test_exact_when_the_velocity_starts_as_the_residual(gamma: float, strategy: Strategy) -> None:
    net, x, stored = prepared(6, gamma=gamma, velocity="residual")

    assert differences(aftermath(net, x, strategy), stored) == []


def accumulate(net: nn.Module, x: Tensor) -> Tensor:
    square(net(x)).backward()
    return square(net(x * 2))


def two_forwards_then_backward(net: nn.Module, x: Tensor) -> Tensor:
    first, second = net(x), net(x + 1)
    return square(first) + square(second)


def twice_in_one_graph(net: nn.Module, x: Tensor) -> Tensor:
    return square(net(net(x)))


def in_bf16_altogether(net: nn.Module, x: Tensor) -> Tensor:
    return square(net.to(torch.bfloat16)(x.to(torch.bfloat16)))


def with_part_of_the_output(net: nn.Module, x: Tensor) -> Tensor:
    return square(net(x)[:, :1])


@in_every_other_way
@pytest.mark.parametrize("gamma", [0.5, 0.9, 1.0])
@pytest.mark.parametrize(
    "step",
    [
        accumulate,
        two_forwards_then_backward,
        twice_in_one_graph,
        under_bf16_autocast,
        in_bf16_altogether,
        with_part_of_the_output,
    ],
)
def test_exact_however_the_network_is_used(
    step: Callable[[nn.Module, Tensor], Tensor], gamma: float, strategy: Strategy
) -> None:
    net, stored = used(step, gamma)

    assert differences(aftermath(net, images(), strategy, step), stored) == []


@lru_cache(maxsize=1)  # as above
def used(
    step: Callable[[nn.Module, Tensor], Tensor], gamma: float
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network, and what such a use leaves behind that stores everything."""
    net = stack(5, kind="Bottleneck", gamma=gamma)
    return net, aftermath(net, images(), "store", step)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("deterministic")
@in_every_other_way
@pytest.mark.parametrize("step", [lambda net, x: square(net(x)), under_bf16_autocast])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_exact_on_a_gpu(
    gamma: float, step: Callable[[nn.Module, Tensor], Tensor], strategy: Strategy
) -> None:
    net = stack(12, kind="Bottleneck", channels=64, gamma=gamma)
    net.insert(3, Dropping(64))
    net.to(GPU).to(memory_format=torch.channels_last)
    x = images(channels=64, side=28).to(GPU, memory_format=torch.channels_last)

    stored, ours = (aftermath(net, x, how, step) for how in ("store", strategy))

    assert differences(ours, stored) == []


def then_the_other_mode(net: nn.Module, x: Tensor) -> Tensor:
    loss = square(net(x))
    net.train(not net.training)
    return loss


@in_every_other_way
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_exact_when_the_mode_changes_before_backward(training: bool, strategy: Strategy) -> None:
    net = stack(5).train(training)

    stored = aftermath(net, images(), "store")
    ours = aftermath(net, images(), strategy, then_the_other_mode)

    assert differences(ours, stored) == []


class Counting(nn.Module):
    """A residual block whose result depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + torch.tanh(self.conv(x) * self.calls)


class Normed(nn.Module):
    """A residual block whose weight is divided by a norm that each call estimates better."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = spectral_norm(nn.Conv2d(8, 8, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x))


@in_every_other_way
@pytest.mark.parametrize("block", [Counting, Normed])
def test_exact_with_a_state_that_each_call_changes(
    block: type[nn.Module], strategy: Strategy
) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(block() for _ in range(4)))

    stored, ours = (aftermath(net, images(), how, accumulate) for how in ("store", strategy))

    assert differences(ours, stored) == []


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "momentum"])
def test_an_argument_may_not_change_before_it_is_needed_again(strategy: Strategy) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: Tensor) -> Tensor:
            return x + torch.sin(x) * shift

    net = MomentumSequential(*(Shifted() for _ in range(3)))
    set_strategy(net, strategy)
    shift = torch.ones(8, 5, 5)
    loss = square(net(images().requires_grad_(), shift))
    shift.add_(1)

    with pytest.raises(InversionError, match="was modified in place before backward"):
        loss.backward()


@in_every_other_way
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_an_empty_batch_has_gradients_of_zero(gamma: float, strategy: Strategy) -> None:
    net = stack(5, gamma=gamma).eval()  # BatchNorm has no statistics of nothing

    left = aftermath(net, images(count=0), strategy)

    grads = [tensor for name, tensor in left.items() if name.startswith("grad")]
    assert len(grads) == len(list(net.parameters())) + 1
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("strategy", ["store", *OTHERS])
def test_inference_mode_computes_the_same(strategy: Strategy) -> None:
    net = stack(5).eval()
    set_strategy(net, strategy)
    with torch.no_grad():
        expected = net(images())
    with torch.inference_mode():
        assert torch.equal(net(images()), expected)


@in_every_other_way
def test_a_layer_may_write_into_what_a_stage_returns(strategy: Strategy) -> None:
    def step(net: nn.Module, x: Tensor) -> Tensor:
        return square(torch.relu_(net(x)))

    # It ends in a block outside the run: what a run returns is its own state, which must stay.
    net = MomentumSequential(*stack(4), nn.Conv2d(8, 4, 1))

    stored, ours = (aftermath(net, images(), how, step) for how in ("store", strategy))

    assert differences(ours, stored) == []


@in_every_other_way
def test_exact_in_channels_last(strategy: Strategy) -> None:
    net = stack(5, kind="Bottleneck").to(memory_format=torch.channels_last)
    x = images(side=6).to(memory_format=torch.channels_last)

    stored, ours = (aftermath(net, x, how) for how in ("store", strategy))

    assert differences(ours, stored) == []
    assert net(x).is_contiguous(memory_format=torch.channels_last)


class OnGraph(nn.Linear):
    """Has a sparse matrix among its buffers."""

    edges: Tensor

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.register_buffer("edges", torch.eye(5).roll(1, 0).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(super().forward(torch.sparse.mm(self.edges, x)))


@pytest.mark.parametrize("in_parts", [False, True])
@in_every_other_way
def test_exact_with_sparse_buffers(strategy: Strategy, *, in_parts: bool) -> None:
    torch.manual_seed(0)
    net, x = MomentumSequential(*(OnGraph() for _ in range(4))), torch.randn(5, 8)
    found = []
    for how in ("store", strategy):
        set_strategy(net, how)
        net.in_parts = in_parts
        found.append(torch.autograd.grad(square(net(x)), [*net.parameters()]))
    assert all(map(torch.equal, *found))


@in_every_other_way
def test_exact_for_an_input_with_gaps_in_memory(strategy: Strategy) -> None:
    net = stack(3)
    x = images(side=8)[:, :, ::2, 1:6]

    assert differences(aftermath(net, x, strategy), aftermath(net, x, "store")) == []


@in_every_other_way
def test_dropout_draws_the_same_numbers_again(strategy: Strategy) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(Dropping() for _ in range(6)))

    stored, ours = (aftermath(net, images(), how) for how in ("store", strategy))

    assert differences(ours, stored) == []  # among them the state of the generator afterwards
    assert not torch.equal(net(images()), net(images()))  # it does drop


def freeze(net: nn.Module, blocks: range) -> None:
    for n in blocks:
        for parameter in net.get_submodule(str(n)).parameters():
            parameter.requires_grad_(False)


@in_every_other_way
@pytest.mark.parametrize("blocks", [range(6), range(3), range(3, 6), range(2, 4)], ids=str)
@pytest.mark.parametrize("input_needs_gradient", [True, False])
def test_exact_with_frozen_blocks(
    blocks: range, input_needs_gradient: bool, strategy: Strategy
) -> None:
    net = stack(6)
    freeze(net, blocks)

    def step(net: nn.Module, x: Tensor) -> Tensor:
        return square(net(x if input_needs_gradient else x.detach()))

    stored, ours = (aftermath(net, images(), how, step) for how in ("store", strategy))

    assert differences(ours, stored) == []
    assert ("grad x" in ours) == input_needs_gradient


@in_every_other_way
def test_exact_with_single_frozen_parameters(strategy: Strategy) -> None:
    net = stack(4, kind="Bottleneck")
    for name, parameter in net.named_parameters():
        parameter.requires_grad_("conv2" in name or "bn3.bias" in name)

    assert differences(aftermath(net, images(), strategy), aftermath(net, images(), "store")) == []


class Conditioned(nn.Module):
    """A residual block with an extra input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + torch.tanh(self.conv(x) * condition)


@in_every_other_way
def test_extra_inputs_of_the_blocks_get_their_gradients(strategy: Strategy) -> None:
    torch.manual_seed(0)
    net = MomentumSequential(*(Conditioned() for _ in range(4)))
    gradients = {}
    for how in ("store", strategy):
        set_strategy(net, how)
        condition = images(seed=3).requires_grad_()
        square(net(images(), condition)).backward()
        gradients[how] = gradient_of(condition)

    assert gradients["store"].any()
    assert torch.equal(gradients[strategy], gradients["store"])


@in_every_other_way
def test_parameters_put_in_place_by_functional_call_are_the_ones_differentiated(
    strategy: Strategy,
) -> None:
    def step(net: nn.Module, x: Tensor) -> Tensor:
        doubled = {name: 2 * parameter for name, parameter in net.named_parameters()}
        return square(torch.func.functional_call(net, doubled, (x,)))

    net = stack(4)

    stored, ours = (aftermath(net, images(), how, step) for how in ("store", strategy))

    assert differences(ours, stored) == []
    assert differences(ours, aftermath(net, images(), strategy))


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_output_is_the_same_with_and_without_gradients(gamma: float) -> None:
    net = stack(8, gamma=gamma).eval()
    with torch.no_grad():
        expected = net(images())

    for strategy in ("store", *OTHERS):
        set_strategy(net, strategy)
        assert torch.equal(net(images()), expected)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_blocks_see_the_same_activations_again_in_reverse(gamma: float) -> None:
    net = stack(9, gamma=gamma)
    net.find_runs(images())  # by tracing the blocks, which would be seen too
    seen: list[Tensor] = []
    for block in net:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))

    square(net(images())).backward()

    assert len(seen) == 18
    assert all(map(torch.equal, seen[9:], reversed(seen[:9])))


@in_every_other_way
def test_batch_norm_counts_a_batch_once(strategy: Strategy) -> None:
    net = stack(3)

    left = aftermath(net, images(), strategy)

    assert {left[name].item() for name in left if name.endswith("num_batches_tracked")} == {1}


def test_the_gradient_is_that_of_the_equations_in_floating_point() -> None:
    # On a grid of double precision, against autograd through (2) as it stands in the paper.
    net = stack(5, gamma=0.8, runs=None).double()
    x = images().double().requires_grad_()
    y, v = x, torch.zeros_like(x)
    blocks = list(copy.deepcopy(net))
    for block in blocks:
        v = 0.8 * v + (1 - 0.8) * (block(y) - y)
        y = y + v
    square(y).backward()
    expected = [x.grad, *(p.grad for block in blocks for p in block.parameters())]

    x.grad = None
    square(net(x)).backward()

    ours = [x.grad, *(p.grad for p in net.parameters())]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def with_batch_norm_updated_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_is_known", lambda module: False)
    monkeypatch.setattr(torch.Tensor, "clone", lambda tensor, **_: tensor)


def with_a_variance_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    recall = Norms._recall
    monkeypatch.setattr(
        Norms,
        "_recall",
        lambda self, calls, norm, x: recall(
            self, iter([norm, x.detach().mean((0, 2, 3)), norm.weight.detach()]), norm, x
        ),
    )


def with_a_remainder_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    undo = Trajectory.undo

    def forgetful(self: Trajectory, y: Tensor) -> None:
        assert self._state.r is not None
        self._state.r.zero_()
        undo(self, y)

    monkeypatch.setattr(Trajectory, "undo", forgetful)


def with_the_last_byte_of_x_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    retreat = Trajectory.retreat

    def forgetful(self: Trajectory, n: int) -> Tensor:
        assert self._state.low is not None
        self._state.low.zero_()
        return retreat(self, n)

    monkeypatch.setattr(Trajectory, "retreat", forgetful)


@pytest.mark.parametrize(
    "mutate",
    [
        with_batch_norm_updated_twice,
        with_a_variance_forgotten,
        with_a_remainder_forgotten,
        with_the_last_byte_of_x_forgotten,
    ],
)
def test_these_tests_notice_a_broken_backward(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = stack(6)
    stored = aftermath(net, images(), "store")
    monkeypatch.setattr(Trajectory, "verify", lambda self: None)
    monkeypatch.setattr(Replay, "_require_same", lambda self, y: None)
    mutate(monkeypatch)

    assert differences(aftermath(net, images(), "momentum"), stored)

"""Loops over the blocks of a list, which may pass each block arguments of its own."""

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pickle import dumps, loads
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from momconv import convert, set_strategy
from momconv.errors import UsageError
from momconv.momentum.autograd import Strategy
from momconv.momentum.sequential import MomentumSequential, momentum_stages

BLOCKS = 5
OWN: dict[str, Callable[["Net", int], Any]] = {
    "a number": lambda net, n: {"rate": 0.1 * n},
    "a tensor": lambda net, n: {"mask": net.masks[n]},
    "nothing for some": lambda net, n: {"mask": net.masks[0]} if n % 2 else {},
    "a number in training": lambda net, n: {"rate": 0.1 * n} if net.training else {},
}


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer, self.keeps = nn.Linear(width, out), width == out

    def forward(self, x: Tensor, rate: float = 0.0, mask: Tensor | None = None) -> Tensor:
        f = torch.tanh(self.layer(x)) * (1 - rate)
        if mask is not None:
            f = f * mask[: f.shape[1]]
        return x + f if self.keeps else f


def call(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


class Net(nn.Module):
    """Has a block that changes the shape after the others."""

    masks: Tensor
    own: Any
    call: Any

    def __init__(self, own: Callable[["Net", int], Any] = lambda _net, _n: {}) -> None:
        super().__init__()
        torch.manual_seed(0)
        widths = [6] * BLOCKS + [4]
        self.blocks = nn.ModuleList(map(Block, widths, widths[1:]))
        self.masks = nn.Parameter(torch.rand(BLOCKS, 6))
        self.own, self.collects, self.call = own, False, call

    def forward(self, x: Tensor) -> Any:
        collected = []
        for n, block in enumerate(self.blocks):
            x = self.call(block, x, **self.own(self, n))
            if self.collects:
                collected.append(x)
        return collected or x


def x() -> Tensor:
    return torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


def stage_of(model: nn.Module) -> MomentumSequential:
    return momentum_stages(model)["blocks"]


def follow(net: Net, stage: MomentumSequential) -> Tensor:
    """What the momentum network is, written down."""
    y, v, gamma = x().double(), torch.zeros(()), stage.gamma
    (run,) = stage.runs or ()
    assert (run.start, run.stop) == (0, BLOCKS - 1)
    for n, (gain, block) in enumerate(zip(run.gains, net.blocks, strict=False)):
        v = gamma * v + (1 - gamma) * gain * (block(y, **net.own(net, n)) - y)
        y = y + v
    last: Tensor = net.blocks[-1](y, **net.own(net, BLOCKS - 1))
    return last


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("own", OWN.values(), ids=OWN)
def test_each_block_gets_its_own_arguments(
    own: Callable[[Net, int], Any], *, training: bool
) -> None:
    plain = Net(own).train(training)
    model = convert(plain, inputs=[x()])
    expected = follow(copy.deepcopy(plain).double(), stage_of(model))
    of_loop = gradients(
        written := copy.deepcopy(plain).double(), follow(written, stage_of(model)).sum()
    )
    of_each = []
    for strategy in get_args(Strategy):
        set_strategy(one := copy.deepcopy(model), strategy)
        y = one(x())
        torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=1e-6)
        of_each.append(gradients(one, y.sum()))
        assert all(map(torch.equal, of_each[0], of_each[-1]))
    torch.testing.assert_close([g.double() for g in of_each[0]], of_loop, rtol=1e-5, atol=1e-6)


def test_arguments_may_begin_to_differ_later() -> None:
    plain = Net()
    model = convert(plain, inputs=[x()])
    assert isinstance(model, Net)
    plain.own = model.own = OWN["a number"]
    torch.testing.assert_close(model(x()).double(), follow(plain.double(), stage_of(model)))


def test_what_blocks_return_has_a_shape_and_a_type() -> None:
    model = convert(Net(), inputs=[x()])
    assert isinstance(model, Net)
    model.collects = True
    first, *_, last = model(x())
    assert isinstance(last, Tensor)
    assert first.shape == (3, 6)
    assert first.dtype == torch.float32


USES: list[Callable[..., Any]] = [
    torch.sum,
    nn.ReLU(),
    copy.copy,
    copy.deepcopy,
    dumps,
    str,
    round,
    partial(divmod, 2),
    list,
    lambda y: y in [x(), 1],
    lambda y: x() @ y,
    lambda y: y == 1,
    lambda y: y != None,  # noqa: E711
    lambda y: setattr(y, "requires_grad", True),
]


def waiting() -> Any:
    first, *_ = stage_of(convert(Net(), inputs=[x()]))
    return first(x())


@pytest.mark.parametrize("use", USES)
def test_what_blocks_return_is_refused_where_it_is_used(use: Callable[[Any], Any]) -> None:
    with pytest.raises(UsageError, match="used what one of them returned"):
        use(waiting())


def test_what_blocks_return_has_nothing_that_depends_on_values() -> None:
    y, left = waiting(), set()
    for name in dir(Tensor):
        with suppress(UsageError):
            found = getattr(y, name)
            with suppress(TypeError):
                found()
            left.add(name)
    of_any_object = {
        *("__class__", "__dict__", "__dir__", "__doc__", "__getattribute__", "__getstate__"),
        *("__hash__", "__init__", "__init_subclass__", "__module__", "__new__", "__repr__"),
        *("__sizeof__", "__subclasshook__", "__weakref__"),
    }
    left.discard("__slotnames__")  # where the class has been pickled
    known = {"shape", "size", "ndim", "dim", "numel", "dtype", "device", "is_cuda"}
    assert left == of_any_object | known


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda y: loads(dumps(y))])
def test_a_copy_of_a_block_in_a_loop_is_one_of_the_block(twin: Callable[[Any], Any]) -> None:
    first: Any = next(iter(stage_of(convert(Net(), inputs=[x()]))))
    block = twin(first)
    assert type(block) is Block
    assert first != block
    assert torch.equal(block.layer.weight, first.layer.weight)


def test_blocks_must_take_their_turns() -> None:
    stage = stage_of(convert(Net(), inputs=[x()]))
    first, second, third, *_ = stage
    for block, y in ((second, x()), (third, first(x())), (first, first(x()))):
        with pytest.raises(UsageError, match="was called out of turn"):
            block(y)


def test_a_block_in_a_loop_is_the_block_in_all_else() -> None:
    stage = stage_of(convert(Net(), inputs=[x()]))
    for turn, block in zip(stage, stage._modules.values(), strict=True):
        assert isinstance(turn, Block)
        assert {block: 1}[turn] == 1
        assert isinstance(block, Block)
        assert turn.layer is block.layer
        turn.keeps = False
        assert not block.keeps


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile reads it
def test_a_loop_may_be_compiled() -> None:
    model = convert(Net(OWN["a tensor"]), inputs=[x()])
    expected = gradients(one := copy.deepcopy(model), one(x()).sum())
    compiled = torch.compile(model, backend="eager")
    assert all(map(torch.equal, gradients(model, compiled(x()).sum()), expected))


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_loop_may_checkpoint_its_blocks(strategy: Strategy) -> None:
    model = convert(Net(), inputs=[x()])
    set_strategy(model, strategy)
    expected = gradients(one := copy.deepcopy(model), one(x()).sum())
    assert isinstance(model, Net)
    model.call = partial(checkpoint, use_reentrant=False)
    assert all(map(torch.equal, gradients(model, model(x()).sum()), expected))


@pytest.mark.filterwarnings("ignore:None of the inputs")  # what waits is no tensor
def test_reentrant_checkpoints_around_blocks_are_refused_where_gradients_would_be_lost() -> None:
    model = convert(Net(), inputs=[x()])
    assert isinstance(model, Net)
    model.call = partial(checkpoint, use_reentrant=True)
    images = x().requires_grad_() * 1

    with pytest.raises(UsageError, match="without gradients, as reentrant"):
        model(images)
    model.call = call
    with torch.no_grad():
        assert model(images).isfinite().all()

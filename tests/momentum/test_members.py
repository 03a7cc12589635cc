"""The blocks of a run outside it, and a stage whose blocks are others later."""

import copy
from collections.abc import Callable
from itertools import product
from typing import Any, get_args

import pytest
import torch
from networks import Scaled, images, square, stack
from torch import Tensor, nn
from torch.export import export
from torch.fx import symbolic_trace
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.checkpoint import checkpoint_sequential

from momconv import MomentumSequential, convert, revert, set_strategy
from momconv.errors import ModelFileError, UsageError
from momconv.momentum.autograd import Strategy
from momconv.momentum.sequential import Run
from momconv.vocabulary import Velocity
from momconv.zoo.networks import build


def spans(net: MomentumSequential) -> list[tuple[int, int]]:
    return [(run.start, run.stop) for run in net.runs or ()]


def iterate(net: MomentumSequential, x: Tensor) -> Tensor:
    for block in net:
        x = block(x)
    return x


class Subclass(Tensor):
    """A tensor of somebody's own."""


WAYS = {
    "a loop": iterate,
    "children": lambda net, x: nn.Sequential(*net.children())(x),
    "a slice": lambda net, x: net[1:](x),
    "checkpoints": lambda net, x: checkpoint_sequential(net, 2, x, use_reentrant=False),
    "reentrant ones": lambda net, x: checkpoint_sequential(net, 4, x, use_reentrant=True),
    "keywords": lambda net, x: net[1](x=net[0](x=x)),
    "views": lambda net, x: net[1](net[0](x).view(x.shape)),
    "functions of one input": lambda net, x: net[1](net[0](x).clone().relu()),
    "a trace": lambda net, x: symbolic_trace(nn.Sequential(*net))(x),
    "a copy": lambda net, x: iterate(copy.deepcopy(net), x),
    "an export": lambda net, x: export(nn.Sequential(*net), (x.detach(),)),
    "a subclass": lambda net, x: iterate(net, x.as_subclass(Subclass)),
}


@pytest.mark.parametrize("strategy", ["store", "momentum"])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_blocks_of_a_run_are_no_plain_network(way: object, strategy: str) -> None:
    assert callable(way)
    net = stack(4)
    net(images())
    set_strategy(net, strategy)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is the plain network and not the momentum network"):
        way(net, images().requires_grad_())


def hooked(net: MomentumSequential, x: Tensor) -> Tensor:
    for block in net:
        block.register_forward_hook(lambda _, __, y: y * 1)
    return iterate(net, x)


COPIES: dict[str, Callable[[MomentumSequential, Tensor], Tensor]] = {
    "detached": lambda net, x: net[1](net[0](x).detach()),
    "a copy of it": lambda net, x: net[1](net[0](x).clone()),
    "a sum with nothing": lambda net, x: net[1](net[0](x) + 0),
    "a narrower type and back": lambda net, x: net[1](net[0](x).half().float()),
    "another type": lambda net, x: net[1].double()(net[0](x).double()),
    "through NumPy": lambda net, x: net[1](torch.from_numpy(net[0](x).detach().numpy().copy())),
    "a hook": hooked,
}


@pytest.mark.parametrize("way", COPIES.values(), ids=COPIES)
def test_nor_are_they_with_copies_in_between(way: object) -> None:
    assert callable(way)
    net = stack(4)
    net(images())
    for is_enabled in (True, False):
        with (
            torch.set_grad_enabled(is_enabled),
            pytest.raises(UsageError, match="is the plain network and not the momentum network"),
        ):
            way(copy.deepcopy(net), images())


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch.compile reads it
def test_a_compiled_loop_over_the_blocks_is_no_plain_network() -> None:
    net = stack(4)
    net(images())
    with pytest.raises(UsageError, match="is the plain network and not the momentum network"):
        torch.compile(iterate, backend="eager")(net, images())


def test_blocks_are_no_plain_network_before_the_first_pass_has_found_the_runs() -> None:
    net = MomentumSequential(*stack(4))
    with pytest.raises(UsageError, match="is the plain network and not the momentum network"):
        iterate(net, images())
    net(images())
    net.gamma = 0
    assert torch.equal(iterate(net, images()), net(images()))
    net.gamma = 0.9
    with pytest.raises(UsageError, match="is the plain network and not the momentum network"):
        iterate(net, images())


def test_torch_fx_goes_through_what_has_no_runs_and_is_told_which_way() -> None:
    inner, x = stack(3).eval(), images()
    inner(x)
    outer = MomentumSequential(nn.Conv2d(8, 8, 1), inner, runs=())
    traced = symbolic_trace(nn.Sequential(outer))
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["0.0", "0.1"]
    assert torch.equal(traced(x), outer(x))
    with pytest.raises(UsageError, match="network") as caught:
        symbolic_trace(nn.Sequential(*inner))
    assert "concrete_args" in str(caught.value.fix)


def test_one_block_alone_is_what_it_is() -> None:
    net, plain = stack(4).eval(), nn.Sequential(*stack(4)).eval()
    net(images())
    assert torch.equal(net[2](images()), plain[2](images()))
    square(net(net(images()))).backward()


def test_each_block_may_be_called_with_what_it_got_in_the_run() -> None:
    torch.manual_seed(0)
    cases: list[tuple[float, float, Velocity]] = [
        (1.0, 0.9, "zero"),
        (0.0, 0.9, "zero"),  # all blocks return what they are called with
        (1.0, 1.0, "zero"),  # and here the second is called with what the first has returned
        (1.0, 0.9, "residual"),
    ]
    for scale, gamma, velocity in cases:
        net = MomentumSequential(*(Scaled() for _ in range(4)), gamma=gamma, velocity=velocity)
        for parameter in net.parameters():
            parameter.data.mul_(scale)
        with torch.no_grad():
            inputs = net.invert(net.integrate(images()))[:-1]
        for block, x in zip(net, inputs, strict=True):
            block(x)
            block(x.clone())
        square(net(net[2](images()))).backward()


def test_a_network_without_runs_or_momentum_may_be_iterated() -> None:
    for net in (stack(4, runs=[]), stack(4, gamma=0)):
        assert torch.equal(iterate(net, images()), net(images()))


def test_the_blocks_of_a_network_that_is_plain_again_are_free() -> None:
    original = build("cifar_resnet20").eval()
    plain = revert(convert(original, stages="all"))
    x = torch.randn(2, 16, 8, 8)
    y = x
    for block in plain.get_submodule("layer1").children():
        y = block(y)
    assert torch.equal(y, original.get_submodule("layer1")(x))
    assert not any(module._forward_hooks for module in plain.modules())


GAINS = (1.0, 2.0, 3.0, 4.0)


def edited(*runs: Run) -> MomentumSequential:
    return stack(6, runs=runs or [Run(1, 5, GAINS, 4)])


def test_a_block_that_is_taken_out_leaves_the_others_their_gains() -> None:
    for index, span, gains in (
        (0, (0, 4), GAINS),
        (1, (1, 4), GAINS[1:]),
        (3, (1, 4), (1.0, 2.0, 4.0)),
        (-1, (1, 5), GAINS),
        (-2, (1, 4), GAINS[:3]),
    ):
        net = edited()
        blocks = [*net]
        assert net.pop(index) is blocks[index]
        assert net.runs == (Run(*span, gains, 4),)
        assert [*net] == [block for block in blocks if block is not blocks[index]]
        square(net(images())).backward()
    net = edited()
    del net[2:]
    assert net.runs == (Run(1, 2, GAINS[:1], 4),)
    del net[1:]
    assert spans(net) == []
    net = edited()
    delattr(net, "0")
    assert net.runs == (Run(0, 4, GAINS, 4),)
    net = edited()
    net *= 2
    with pytest.raises(UsageError, match="plain network"):
        iterate(net, images())


@pytest.mark.parametrize(
    "way", [iterate, WAYS["a trace"], WAYS["a copy"], lambda net, x: net[0](x)]
)
def test_a_block_that_is_left_alone_of_its_run_is_no_plain_network(way: Any) -> None:
    net, x = edited(Run(0, 6, (2.9,) * 6, 4)).eval(), images()
    expected = x + 0.29 * (net[0](x) - x)
    for _ in range(5):
        net.pop(-1)
    with pytest.raises(UsageError, match="BasicBlock of a momentum run was called by itself"):
        way(net, x)
    assert torch.allclose(net(x), expected, atol=1e-5)
    assert torch.equal(symbolic_trace(nn.Sequential(net))(x), net(x))
    net.gamma, net.runs = 1.0, [Run(0, 1, (1.0,), 4)]  # which is what the block computes
    assert torch.allclose(iterate(net, x), net(x), atol=1e-5)
    assert net.pop(0)(x).shape == x.shape


def test_a_block_that_is_put_in_moves_the_runs_behind_it() -> None:
    for index, span in ((0, (2, 6)), (1, (2, 6)), (5, (1, 5)), (-1, (1, 5)), (6, (1, 5))):
        net = edited()
        net.insert(index, nn.ReLU())
        assert net.runs == (Run(*span, GAINS, 4),)
    assert edited().append(nn.ReLU()).runs == edited().runs
    for index in (2, 4, -2):
        net = edited()
        with pytest.raises(UsageError, match="in the midst of a momentum run"):
            net.insert(index, nn.ReLU())
        assert len(net) == 6


def test_blocks_that_have_left_are_ordinary() -> None:
    net, x = edited(Run(0, 5, (1.0,) * 5)), images()
    gone = [net.pop(4), net.pop(0), net[1]]
    net[1] = gone[0]
    net[1] = copy.deepcopy(gone[0])
    assert nn.Sequential(*gone)(x).shape == x.shape
    net = stack(3)  # whose runs nobody knows
    assert nn.Sequential(net.pop(0), net.pop(0))(x).shape == x.shape


def emptied(*blocks: nn.Module) -> MomentumSequential:
    net = MomentumSequential(*blocks)
    net.find_runs(images())
    while len(net):
        net.pop(0)
    return net


@pytest.mark.parametrize(
    "make",
    [
        lambda *blocks: MomentumSequential(*blocks, gamma=0),
        lambda *blocks: MomentumSequential(*blocks, runs=[]),
        lambda *blocks: revert(MomentumSequential(*blocks)),
        emptied,
    ],
    ids=["plain", "without runs", "reverted", "emptied"],
)
def test_blocks_of_two_stages_are_free_when_neither_has_them_in_a_run(
    make: Callable[..., nn.Module],
) -> None:
    net, x = edited(Run(0, 6, (1.0,) * 6)).eval(), images()
    for owner in (net, copy.copy(net)):
        blocks = [*owner]
        other = make(*blocks).eval()
        if len([*other.children()]):
            plain = nn.Sequential(*copy.deepcopy(blocks))
            assert torch.equal(other(x), MomentumSequential(*plain, gamma=0)(x))
        with pytest.raises(UsageError, match="plain network"):
            iterate(owner, x)
    del net, owner
    plain = MomentumSequential(*blocks, gamma=0)
    assert torch.equal(iterate(plain, x), plain(x))


def test_another_block_takes_the_place_of_one() -> None:
    puts: list[Callable[[MomentumSequential, nn.Module], None]] = [
        lambda net, block: net.__setitem__(2, block),
        lambda net, block: net.set_submodule("2", block),
        lambda net, block: net.add_module("2", block),
    ]
    for put in puts:
        net = edited()
        put(net, stack(1, seed=7)[0])
        assert net.runs == edited().runs
        with pytest.raises(UsageError, match="plain network"):
            net[2](net[1](images()))


def test_nothing_takes_the_place_of_none() -> None:
    puts: list[Callable[[MomentumSequential], object]] = [
        lambda net: setattr(net, "2", None),
        lambda net: net.append(None),  # type: ignore[arg-type]
        lambda _: MomentumSequential(stack(1), None),  # as PyTorch's own takes it
    ]
    for put in puts:
        net = edited()
        with pytest.raises(UsageError, match="which cannot be called"):
            put(net)
        assert spans(net) == spans(edited())


def test_a_stage_that_an_older_version_pickled_is_known_as_such() -> None:
    state = vars(edited())
    with pytest.raises(ModelFileError, match="by an older momconv: it lacks _gamma"):
        edited().__setstate__({name: state[name] for name in state if name != "_gamma"})


def test_blocks_that_are_gone_without_a_word_are_missed() -> None:
    net = edited()
    for name in ("5", "4"):
        net._modules.pop(name)
    with pytest.raises(UsageError, match="there are 4 blocks, and no run"):
        net(images())


class Wrapping(nn.Linear):
    """Returns something around its output."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(8, 8)
        self.wrap = wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(x + super().forward(x))


@pytest.mark.parametrize("runs", [[Run(0, 2, (1.0, 1.0))], []], ids=["run", "plain"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: [y], lambda y: {"y": y}, id])
def test_a_block_must_return_a_tensor(
    wrap: Callable[[Tensor], Any], place: int, runs: list[Run]
) -> None:
    net = MomentumSequential(Wrapping(torch.relu), Wrapping(torch.relu), runs=runs)
    net[place].wrap = wrap
    kind = type(wrap(torch.zeros(1))).__name__
    for strategy, mode in product(get_args(Strategy), (torch.enable_grad, torch.inference_mode)):
        set_strategy(net, strategy)
        with mode(), pytest.raises(UsageError, match=f"a Wrapping returned a {kind}, not a tensor"):
            net(torch.randn(2, 8))


def test_a_block_must_return_a_tensor_whoever_calls_it() -> None:
    net = MomentumSequential(*(Wrapping(lambda y: (y, None)) for _ in range(2)))
    refusal = pytest.raises(UsageError, match="a Wrapping returned a tuple, not a tensor")
    with pytest.warns(UserWarning, match="no block follows"), refusal:
        net(torch.randn(2, 8))
    net.runs = (Run(0, 2, (1.0, 1.0)),)
    for call in (torch.func.vmap(net), net.integrate):
        with pytest.raises(UsageError, match="a Wrapping returned a tuple, not a tensor"):
            call(torch.randn(2, 8))


def test_hooks_are_called_once_with_values() -> None:
    net = stack(4)
    seen: list[float] = []
    for block in net:
        block.register_forward_hook(lambda _, __, y: seen.append(y.mean().item()))
    calls: list[float] = []
    hook = register_module_forward_hook(lambda _, __, y: calls.append(y.mean().item()))
    net(images())
    first = len(calls)
    net(images())
    hook.remove()
    assert len(seen) == 8
    assert len(calls) == 2 * first

import copy
import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from momconv.eightbit import AdamW8bit, SGD8bit, optimizers
from momconv.eightbit.blocks import Blocks, numbers
from momconv.errors import UsageError
from momconv.planner.measurement import measure

LAST = torch.channels_last
KINDS: list[tuple[type, type, dict[str, Any]]] = [
    (AdamW8bit, optim.AdamW, {"weight_decay": 0.1}),
    (SGD8bit, optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (SGD8bit, optim.SGD, {"momentum": 0.5}),
]


def parameters() -> list[nn.Parameter]:
    """Channels last, one and a half blocks in it; not a multiple of a block; too small."""
    torch.manual_seed(0)
    shapes = torch.randn(32, 43, 3, 1).to(memory_format=LAST), torch.randn(70, 65), torch.randn(9)
    return [nn.Parameter(values) for values in shapes]


def train(optimizer: optim.Optimizer, own: Iterable[nn.Parameter], steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        for p in own:
            p.grad = torch.randn_like(p)
        optimizer.step()


def assert_same(own: optim.Optimizer, other: optim.Optimizer) -> None:
    mine, yours = ([p for g in o.param_groups for p in g["params"]] for o in (own, other))
    for p, q in zip(mine, yours, strict=True):
        assert torch.equal(p, q)
        assert own.state[p].keys() == other.state[q].keys()
        for name, value in own.state[p].items():
            assert torch.equal(value, other.state[q][name])
            assert value.dtype == other.state[q][name].dtype


def test_the_numbers_are_those_of_the_libraries() -> None:
    signed, unsigned = numbers(signed=True).tolist(), numbers(signed=False).tolist()
    assert len(signed) == len(unsigned) == 256
    assert signed[126:130] == pytest.approx([-5.5e-7, 0, 5.5e-7, 3.25e-6])
    assert (signed[0], signed[-2], signed[-1]) == pytest.approx((-0.99296875, 0.99296875, 1))
    assert unsigned[:3] == pytest.approx([0, 3.25e-7, 7.75e-7])
    assert unsigned[-2:] == pytest.approx([0.996484375, 1])


@pytest.mark.parametrize("signed", [True, False])
def test_a_value_becomes_the_nearest_and_only_zero_may_become_zero_in_a_root(signed: bool) -> None:
    values = torch.tensor([0.5, 1e-9, 0.0])
    state = Blocks(torch.zeros(3, dtype=torch.uint8), torch.zeros(1), signed)
    state.write(0, values)
    near = 0.5 * numbers(signed=signed)
    assert state.scales.tolist() == [0.5]
    nearest = near[(near - values[:, None]).abs().argmin(1)].tolist()
    assert state.read(0, 3).tolist() == (nearest if signed else [0.5, near[1], near[1]])


@pytest.mark.parametrize(("kind", "plain", "arguments"), KINDS)
def test_the_loop_and_the_pieces_give_the_same_bits_near_those_of_full_precision(
    kind: type, plain: type, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for make, has_loops in ((kind, True), (kind, False), (plain, True)):
        monkeypatch.setattr(optimizers, "_has_loops", lambda has=has_loops: has)
        monkeypatch.setattr(optimizers, "_PIECE", 512)
        own = parameters()
        made.append(make(own, lr=0.01, **arguments))
        train(made[-1], own, range(4))
    looped, in_pieces, exact = made
    assert_same(looped, in_pieces)
    own, others = (o.param_groups[0]["params"] for o in (looped, exact))
    for p, q, start in zip(own, others, parameters(), strict=True):
        error, change = (p - q).norm(), (q - start).norm()
        assert 0 < error < 0.03 * change if p.numel() >= 4096 else error < 1e-5 * change


@pytest.mark.parametrize(("kind", "_plain", "arguments"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [4095, 5000])
@pytest.mark.parametrize("size", [1e-4, 300])  # whose squares are no numbers of half precision
def test_a_step_of_half_precision_is_that_of_single_precision_rounded(
    kind: type, _plain: type, arguments: dict[str, Any], dtype: torch.dtype, count: int, size: float
) -> None:
    torch.manual_seed(0)
    values, gradient = torch.randn(count).to(dtype), (size * torch.randn(count)).to(dtype)
    half, single = nn.Parameter(values), nn.Parameter(values.float())
    half.grad, single.grad = gradient, gradient.float()
    made = [kind([p], lr=0.01, **arguments) for p in (half, single)]
    for optimizer in made:
        optimizer.step()
    assert torch.equal(half, single.to(dtype))
    for name, value in made[1].state[single].items():
        assert torch.equal(made[0].state[half][name], value)


@pytest.mark.parametrize(("kind", "_plain", "arguments"), KINDS)
def test_what_goes_on_from_a_saved_state_has_the_same_bits(
    kind: type, _plain: type, arguments: dict[str, Any]
) -> None:
    own = parameters()
    whole = kind(own, lr=0.01, **arguments)
    train(whole, own, range(2))
    others = copy.deepcopy(own)
    resumed = kind(others, lr=0.5, **arguments)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    train(whole, own, range(2, 4))
    train(resumed, others, range(2, 4))
    assert_same(whole, resumed)


def test_a_step_makes_no_copy_of_the_state() -> None:
    p = nn.Parameter(torch.ones(1024, 1024))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    state = measure(optimizer.step, torch.device("cpu"))
    assert 2 * p.numel() < state < 2.1 * p.numel()  # which it begins with
    assert measure(optimizer.step, torch.device("cpu")) < 0.01 * p.numel()


@pytest.mark.parametrize(("kind", "_plain", "arguments"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pieces", [1, 2])
def test_it_is_known_what_a_step_needs_for_itself(
    kind: Any,
    _plain: type,
    arguments: dict[str, Any],
    dtype: torch.dtype,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers, "_PIECE", 2**16)
    p = nn.Parameter(torch.ones(pieces * 2**16 + 1, dtype=dtype))
    optimizer = kind([p], **arguments)
    for has_loops in (True, False):
        monkeypatch.setattr(optimizers, "_has_loops", lambda has=has_loops: has)
        p.grad = torch.ones_like(p)
        optimizer.step()
        needed = measure(optimizer.step, torch.device("cpu"))
        assert kind.step_bytes(p, "cpu") == pytest.approx(needed, rel=1e-3, abs=1000)
    assert kind.step_bytes(p, "cuda") == kind.step_bytes(p, "cpu")


def test_autograd_notices_a_step() -> None:
    p = nn.Parameter(torch.ones(5000))
    loss = (p * p).sum()
    p.grad = torch.ones_like(p)
    SGD8bit([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_in_another_memory_format_counts_by_its_indices() -> None:
    def step(layout: torch.memory_format) -> Tensor:
        p = nn.Parameter(torch.zeros(32, 43, 3, 1).to(memory_format=LAST))
        p.grad = torch.arange(p.numel()).view(p.shape).float().to(memory_format=layout)
        SGD8bit([p], lr=1.0).step()
        return p.detach()

    assert torch.equal(step(LAST), step(torch.contiguous_format))


def as_in_files(state: dict[str, Any]) -> dict[str, Any]:
    """Such as safetensors: without a memory layout."""
    states = {
        number: {name: value.contiguous() for name, value in own.items()}
        for number, own in state["state"].items()
    }
    return {**state, "state": states}


@pytest.mark.parametrize(("kind", "plain", "arguments"), KINDS)
def test_scales_follow_bytes_into_another_memory_layout(
    kind: type, plain: type, arguments: dict[str, Any]
) -> None:
    """By a state that was saved from channels last, and by a parameter that is laid out anew."""
    torch.manual_seed(0)
    rates = 10 ** torch.linspace(-4, 0, 32 * 43).view(32, 43, 1, 1)  # so that scales differ
    kept, laid_out, loading, full = (nn.Parameter(torch.zeros(32, 43, 3, 1)) for _ in range(4))
    kept.data, laid_out.data, full.data = (p.to(memory_format=LAST) for p in (kept, laid_out, full))
    made = [make([p], lr=0.01, **arguments) for make, p in ((kind, kept), (kind, laid_out))]
    other, exact = kind([loading], lr=0.01, **arguments), plain([full], lr=0.01, **arguments)

    def step(*parts: tuple[optim.Optimizer, nn.Parameter]) -> None:
        gradient = torch.randn(kept.shape) * rates
        for optimizer, p in parts:
            p.grad = gradient.clone()
            optimizer.step()

    step((made[0], kept), (made[1], laid_out), (exact, full))
    loading.data.copy_(kept)
    other.load_state_dict(as_in_files(made[0].state_dict()))
    laid_out.data = laid_out.data.contiguous()
    for _ in range(3):
        step((made[0], kept), (made[1], laid_out), (other, loading), (exact, full))

    assert torch.equal(laid_out, loading)
    assert made[1].state[laid_out].keys() == made[0].state[kept].keys()
    error = (kept - full).norm()
    assert (laid_out - full).norm() < 1.5 * error


@pytest.mark.parametrize(("kind", "_plain", "arguments"), KINDS)
@pytest.mark.parametrize("side", [10, 100])
def test_a_parameter_with_gaps_in_memory_changes_as_one_without(
    kind: type, _plain: type, arguments: dict[str, Any], side: int
) -> None:
    torch.manual_seed(0)
    whole = torch.randn(side, 2 * side)
    gaps, dense = nn.Parameter(whole[:, ::2]), nn.Parameter(whole[:, ::2].clone())
    rest = whole[:, 1::2].clone()
    made = [kind([p], lr=0.01, **arguments) for p in (gaps, dense)]
    for _ in range(2):
        gaps.grad = dense.grad = torch.randn(side, side)
        for optimizer in made:
            optimizer.step()
    assert_same(*made)
    assert torch.equal(whole[:, 1::2], rest)


def test_gradients_of_which_there_is_no_byte_are_refused() -> None:
    sparse = nn.Parameter(torch.ones(5000, 2))
    sparse.grad = torch.ones(5000, 2).to_sparse()
    turning = nn.Parameter(torch.ones(5000, dtype=torch.complex64))
    turning.grad = torch.ones_like(turning)
    for p, said in ((sparse, "torch.sparse_coo"), (turning, "torch.complex64")):
        with pytest.raises(UsageError, match=f"adamw-8bit takes real, dense gradients.*{said}"):
            AdamW8bit([p]).step()


@pytest.mark.parametrize(
    "saved", [optim.AdamW, partial(optim.SGD, momentum=0.9), SGD8bit, AdamW8bit]
)
def test_the_state_of_another_optimiser_is_refused_and_changes_nothing(saved: Any) -> None:
    own = parameters()
    other: optim.Optimizer = saved(own, lr=0.5, weight_decay=0.1)
    train(other, own, range(1))
    kind = AdamW8bit if saved is SGD8bit else SGD8bit
    mine = kind(own, lr=0.1)
    train(mine, own, range(1))
    before = copy.deepcopy(mine.state_dict())
    with pytest.raises(UsageError, match=r"is none of (sgd|adamw)-8bit, which has .*_scales") as e:
        mine.load_state_dict(other.state_dict())
    assert e.value.fix == "load it into an optimiser of the class that it was saved from"
    assert mine.param_groups[0]["lr"] == 0.1
    assert_same_state(mine.state_dict(), before)


def assert_same_state(own: dict[str, Any], other: dict[str, Any]) -> None:
    assert own["param_groups"] == other["param_groups"]
    for number, state in other["state"].items():
        assert all(torch.equal(own["state"][number][name], value) for name, value in state.items())


WRONG: list[tuple[type, type, dict[str, Any]]] = [
    (SGD8bit, optim.SGD, {"lr": -0.1}),
    (SGD8bit, optim.SGD, {"momentum": -1}),
    (SGD8bit, optim.SGD, {"weight_decay": -1}),
    (SGD8bit, optim.SGD, {"nesterov": True}),
    (AdamW8bit, optim.AdamW, {"lr": float("nan")}),
    (AdamW8bit, optim.AdamW, {"betas": (0.9, 1.0)}),
    (AdamW8bit, optim.AdamW, {"eps": -1}),
    (AdamW8bit, optim.AdamW, {"weight_decay": -1}),
]


@pytest.mark.parametrize(("kind", "plain", "arguments"), WRONG)
def test_what_pytorch_refuses_is_refused_in_its_words(
    kind: type, plain: type, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"Invalid|Nesterov") as theirs:
        plain(parameters(), **arguments)
    with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
        kind(parameters(), **arguments)

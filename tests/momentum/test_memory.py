"""What each strategy holds, by the allocator's own account."""

from functools import partial

import pytest
import torch
from networks import Scaled, images, square, stack

from momconv import MomentumSequential, set_strategy
from momconv.momentum.autograd import Strategy
from momconv.planner.measurement import measure

DEPTHS = (8, 40)
CPU = torch.device("cpu")


def peak(depth: int, strategy: Strategy, gamma: float = 0.9) -> float:
    """Peak bytes of one training step, in tensors of x's size."""
    net = stack(depth, channels=16, gamma=gamma)
    set_strategy(net, strategy)
    x = images(channels=16, side=32, count=8)
    net.find_runs(x)
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return measure(lambda: square(net(x)).backward(), CPU) / x.nbytes


def test_momentum_holds_the_same_for_any_depth_but_for_side_information() -> None:
    shallow, deep = (peak(depth, "momentum") for depth in DEPTHS)

    bits = 8  # γ = 0.9 at 40 blocks: int16 instead of int8
    assert deep - shallow <= bits / 32 + 0.2


def test_storing_and_checkpointing_grow_by_what_a_block_needs() -> None:
    blocks = DEPTHS[1] - DEPTHS[0]

    for strategy, tensors in (("store", 5), ("checkpoint", 1)):
        shallow, deep = (peak(depth, strategy) for depth in DEPTHS)  # type: ignore[arg-type]
        assert (deep - shallow) / blocks == pytest.approx(tensors, abs=0.5)


def test_side_information_is_a_bit_a_block_at_gamma_one_half() -> None:
    shallow, deep = (peak(depth, "momentum", gamma=0.5) for depth in DEPTHS)

    blocks = DEPTHS[1] - DEPTHS[0]
    assert (deep - shallow) * 32 / blocks <= 1.5


def peak_of_elementwise_blocks(dtype: torch.dtype) -> float:
    """Peak bytes of one training step, in tensors of x's size in single precision."""
    torch.manual_seed(0)
    net = MomentumSequential(*(Scaled() for _ in range(8))).to(dtype)
    x = images(side=64, count=8)
    net.find_runs(x.to(dtype))
    step = partial(lambda x: net(x).sum().backward(), x.to(dtype))
    return measure(step, CPU) / x.nbytes


def test_in_half_precision_only_x_and_v_stay_wide() -> None:
    wide, narrow = map(peak_of_elementwise_blocks, (torch.float32, torch.bfloat16))

    state = 2 + 8 / 32  # x, v and the remainder
    assert narrow - state <= 0.75 * (wide - state)

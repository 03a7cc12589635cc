"""Measured on real networks; what a step of a network costs is checked in test_measurement."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.planner.measurement import per_image
from momconv.planner.micro_batch import Line, StaticBytes
from momconv.planner.profile import (
    MEASUREMENTS,
    VARIANTS,
    MemoryProfile,
    Profile,
    Variant,
    profile,
)
from momconv.surgery.conversion import convert
from momconv.zoo.networks import build

CPU = torch.device("cpu")
SIDE = 32
IMAGE = 3 * SIDE**2 * 4  # bytes


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return convert(build("cifar_resnet44"), 0.9)


@pytest.fixture(scope="module")
def measured(network: nn.Module) -> MemoryProfile:
    return profile(network, SIDE, device=CPU)


def needs(measured: MemoryProfile) -> dict[Variant, int]:
    return {p.variant: p.peak.bytes_per_image for p in measured.profiles}


def test_deep_stages_need_least_with_momentum(measured: MemoryProfile) -> None:
    need = needs(measured)
    assert list(need) == list(VARIANTS)
    assert need["momentum"] < need["checkpoint"] < need["plain"] < need["store"]
    assert need["auto"] <= need["momentum"]


def test_plain_is_the_network_that_was_never_converted(measured: MemoryProfile) -> None:
    line = per_image(build("cifar_resnet44").train(), SIDE, precision="fp32", device=CPU)
    assert needs(measured)["plain"] == line.bytes_per_image + IMAGE


def test_what_a_stage_holds_does_not_grow_with_momentum_s_depth(measured: MemoryProfile) -> None:
    held = {p.variant: p.held_bytes for p in measured.profiles}
    deeper = profile(convert(build("cifar_resnet56"), 0.9), SIDE, device=CPU)
    grown = {p.variant: p.held_bytes["layer1"] for p in deeper.profiles}
    assert grown["momentum"] == held["momentum"]["layer1"]
    x = 16 * SIDE**2 * 4
    assert grown["checkpoint"] == held["checkpoint"]["layer1"] + 2 * x
    assert grown["plain"] > held["plain"]["layer1"] + 2 * x


def test_the_stages_are_those_of_the_network(measured: MemoryProfile) -> None:
    for p in measured.profiles:
        assert list(p.held_bytes) == ["stem", "layer1", "layer2", "layer3", "head"]
        assert p.peak_stage in p.held_bytes


def test_the_network_stays_as_it_is(network: nn.Module, measured: MemoryProfile) -> None:
    stages = momentum_stages(network).values()
    assert {(stage.gamma, stage.strategy) for stage in stages} == {(0.9, "momentum")}
    assert all(parameter.grad is None for parameter in network.parameters())


def test_progress_is_told_before_each_measurement() -> None:
    told = list[tuple[int, str]]()
    network = convert(build("cifar_resnet20"), 0.9)
    profile(network, 16, device=CPU, progress=lambda *args: told.append(args))
    assert [done for done, _ in told] == list(range(MEASUREMENTS))
    assert told[0][1] == "plain, 2 images"


def test_a_network_without_momentum_is_refused() -> None:
    plain = build("cifar_resnet20")
    for network in (plain, convert(plain, 0)):
        with pytest.raises(UsageError):
            profile(network, SIDE, device=CPU)


@pytest.mark.parametrize(("budget", "batch"), [(29, 0), (99, 0), (100, 1), (109, 1), (110, 2)])
def test_a_budget_holds_everything(budget: int, batch: int) -> None:
    one = Profile("plain", Line(fixed_bytes=60, bytes_per_image=10), "layer1", {})
    measured = MemoryProfile(StaticBytes(weights=10, gradients=10, optimizer=10), (one,))
    assert measured.largest_batch(one, budget) == batch
    heavier = replace(measured, static=StaticBytes(weights=10, gradients=10, optimizer=20))
    assert heavier.largest_batch(one, budget + 10) == batch

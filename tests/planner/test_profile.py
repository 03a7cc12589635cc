"""Predictions are compared with measured steps in test_prediction."""

import pytest
import torch
from torch import nn

from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.planner.prediction import Training, peak_memory
from momconv.planner.profile import (
    EXAMPLE,
    VARIANTS,
    MemoryProfile,
    Variant,
    compare_peaks,
    profile,
)
from momconv.surgery.conversion import convert
from momconv.zoo.networks import build

SIDE = 32


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return convert(build("cifar_resnet44"), 0.9)


@pytest.fixture(scope="module")
def profiled(network: nn.Module) -> MemoryProfile:
    return profile(network, Training(SIDE))


def needs(profiled: MemoryProfile) -> dict[Variant, int]:
    return {p.variant: p.peak.bytes_per_image for p in profiled.profiles}


def test_deep_stages_need_least_with_momentum(profiled: MemoryProfile) -> None:
    need = needs(profiled)
    assert list(need) == list(VARIANTS)
    assert need["momentum"] < need["checkpoint"] < need["plain"]
    assert need["auto"] <= need["momentum"]


def test_plain_is_the_network_that_was_never_converted(profiled: MemoryProfile) -> None:
    theirs = peak_memory(build("cifar_resnet44").train(), EXAMPLE, SIDE)
    assert profiled["plain"].example == theirs


def test_the_course_goes_through_all_stages_and_back_and_over_the_peak(
    profiled: MemoryProfile,
) -> None:
    assert profiled.stages == ("stem", "layer1", "layer2", "layer3", "head")
    for p in profiled.profiles:
        places, alive = zip(*p.course, strict=True)
        assert {int(place) for place in places} == set(range(10))
        assert max(alive) == p.example.total
    deep = {p.variant: max(b for x, b in p.course if int(x) == 4) for p in profiled.profiles}
    assert deep["momentum"] < deep["checkpoint"] < deep["plain"]


def test_the_curve_is_the_peak_of_other_batches_too(
    network: nn.Module, profiled: MemoryProfile
) -> None:
    peak = peak_memory(network.train(), 64, SIDE, strategy="checkpoint").total
    assert profiled["checkpoint"].peak.at(64) == pytest.approx(peak, rel=0.01)


def test_the_network_stays_as_it_is(network: nn.Module, profiled: MemoryProfile) -> None:
    stages = momentum_stages(network).values()
    assert {(stage.gamma, stage.strategy) for stage in stages} == {(0.9, "momentum")}
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_measurement_agrees_and_progress_is_told_before_each_variant() -> None:
    told = list[tuple[int, str]]()
    network = convert(build("cifar_resnet20"), 0.9)
    measured = profile(
        network, Training(16), measuring=True, progress=lambda *args: told.append(args)
    )
    assert told == list(enumerate(VARIANTS))
    for p in measured.profiles:
        assert p.measured is not None
        assert p.measured.at(3) == pytest.approx(p.predicted.at(3), rel=0.03)
        assert p.peak.at(3) == p.measured.at(3)
        assert p.images_per_second is not None
        assert p.images_per_second > 0


def test_no_memory_is_needed_for_the_network() -> None:
    with torch.device("meta"):
        network = convert(build("cifar_resnet20"), 0.9)
    real = profile(convert(build("cifar_resnet20"), 0.9), Training(16))
    assert profile(network, Training(16)) == real


def test_a_network_without_momentum_is_refused() -> None:
    plain = build("cifar_resnet20")
    for network in (plain, convert(plain, 0)):
        with pytest.raises(UsageError):
            profile(network, Training(SIDE))


def test_a_network_that_stayed_plain_is_compared_with_what_it_could_have_been() -> None:
    training, network = Training(16, "fp32", "sgd"), build("cifar_resnet20")
    plain = convert(network, 0)
    with_momentum = compare_peaks(convert(network, 0.9), training, 4, "store")
    peaks = compare_peaks(plain, training, 4, "store")
    assert list(peaks) == ["plain", "checkpointed", "momentum", "chosen"]
    assert peaks["chosen"].total == peaks["plain"].total == with_momentum["plain"].total
    assert peaks["momentum"].total == with_momentum["momentum"].total < peaks["plain"].total
    assert {stage.gamma for stage in momentum_stages(plain).values()} == {0}

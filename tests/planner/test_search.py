"""Plans are checked against predictions; those are checked in test_prediction."""

import copy
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

import momconv
from momconv.errors import ResourceError, UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.planner.cost import Speed, estimate_speed
from momconv.planner.outlook import SLACK
from momconv.planner.plan import Fixed, Request
from momconv.planner.prediction import Predictor, Training, peak_memory
from momconv.planner.search import plan, search
from momconv.recipe import TrainRecipe, load_recipe
from momconv.training.network import start_training
from momconv.units import format_bytes, parse_bytes
from momconv.zoo.networks import build
from momconv.zoo.stages import freeze

MIB = 2**20
SIDE = 32
CPU = estimate_speed("cpu", "fp32")


@pytest.fixture(scope="module")
def deep() -> nn.Module:
    """Deep enough for every strategy to need another amount."""
    with torch.device("meta"):
        return momconv.convert(build("cifar_resnet20"), 0.9, stages="all").train()


def peak_of(model: nn.Module, images: int, strategy: Any) -> int:
    return peak_memory(model, images, SIDE, strategy=strategy).total


def read_modes(model: nn.Module) -> list[Any]:
    return [(m.training, [p.requires_grad for p in m.parameters()]) for m in model.modules()]


def room_for(model: nn.Module, images: int, strategy: Any) -> int:
    """A little more than so many images take."""
    return int(peak_of(model, images, strategy) * 1.015)


def test_everything_is_stored_where_it_fits(deep: nn.Module) -> None:
    made = plan(deep, SIDE, "8GiB")
    assert (made.strategy, made.sizes) == ("store", (32,))
    again = plan(deep, SIDE, "8GiB", strategy="checkpoint")
    assert made.seconds_per_image
    assert again.seconds_per_image
    assert 0 < made.seconds_per_image < again.seconds_per_image
    assert made.peak
    assert made.peak.total == made.predicted_bytes == peak_of(deep, 32, "store")
    assert made.limit_bytes == 8 * 2**30


def seconds(
    model: nn.Module, images: int, strategy: Any, speed: Speed = CPU, *, side: int = SIDE
) -> float:
    return speed.seconds(Predictor(model, Training(side)).predict(images, strategy).work)


@pytest.mark.parametrize("strategy", ["checkpoint", "segment", "auto"])
def test_the_whole_batch_goes_through_at_least_as_fast_as_under_any_strategy(
    deep: nn.Module, strategy: Any
) -> None:
    made = plan(deep, SIDE, room_for(deep, 32, strategy))
    assert made.sizes == (32,)
    assert made.predicted_bytes == peak_of(deep, 32, made.strategy) <= made.limit_bytes
    assert (made.seconds_per_image or 1) * 32 <= seconds(deep, 32, strategy)


def test_no_stages_treated_alike_or_apart_are_faster_by_three_hundredths(deep: nn.Module) -> None:
    """Not even of those that are found by trying all."""
    ways = ("store", "checkpoint", "momentum")
    mappings = [
        dict(zip(momentum_stages(deep), chosen, strict=True)) for chosen in product(ways, repeat=3)
    ]
    predictor = Predictor(deep, Training(SIDE))
    tried = [predictor.predict(32, mapping) for mapping in mappings]
    peaks = sorted(step.peak.total for step in tried)
    for peak in peaks[:: len(peaks) // 5]:
        limit = int(peak * 1.0102)
        fitting = [CPU.seconds(s.work) for s in tried if s.peak.total <= limit * (1 - SLACK)]
        made = plan(deep, SIDE, limit)
        assert made.sizes == (32,)
        assert (made.seconds_per_image or 1) * 32 <= 1.03 * min(fitting)


def test_where_none_does_batchnorm_gets_as_many_images_as_possible(deep: nn.Module) -> None:
    limit = min(room_for(deep, 16, "auto"), peak_of(deep, 32, "segment"))
    made = plan(deep, SIDE, limit)
    assert made.sizes == (16, 16)
    assert made.strategy != "store"
    assert plan(deep, SIDE, limit, strategy="store").micro_batch < 8


def test_without_batchnorm_speed_counts(deep: nn.Module) -> None:
    """Micro-batches then come to the same as the batch, so nothing need be computed again."""
    start_training(deep, TrainRecipe(freeze_bn=True))
    try:
        made = plan(deep, SIDE, room_for(deep, 9, "store"))
    finally:
        start_training(deep, TrainRecipe())
        deep.requires_grad_(requires_grad=True)
    assert made.strategy == "store"
    assert made.sizes == (8, 8, 8, 8)


def test_a_network_without_momentum_stages_is_planned_as_it_is() -> None:
    model = build("cifar_resnet20").train()
    made = plan(model, SIDE, room_for(model, 8, None), batch_size=16)
    assert (made.strategy, made.sizes) == ("store", (8, 8))


def test_the_mode_of_the_network_does_not_matter_and_stays(deep: nn.Module) -> None:
    trained = plan(deep, SIDE, "1GiB").peak
    assert plan(deep.eval(), SIDE, "1GiB").peak == trained
    assert not any(module.training for module in deep.modules())
    deep.train()


def test_without_a_limit_what_is_free_counts() -> None:
    made = plan(build("cifar_resnet20"), SIDE)
    assert made.sizes == (32,)
    assert made.limit_bytes > made.predicted_bytes


def test_a_leaner_strategy_wins_if_it_is_faster(deep: nn.Module) -> None:
    """How fast each is depends on the device: here only bytes count, or only operations."""
    limit = max(peak_of(deep, 32, strategy) for strategy in ("checkpoint", "segment", "auto"))
    assert peak_of(deep, 32, "store") > limit

    def choose(speed: Speed) -> Any:
        request = Request(SIDE, batch_size=32, memory=int(limit * 1.015))
        return search(deep, request, lambda *_: speed).strategy

    for speed in (Speed(0, 0, 1e-9), Speed(1e-3, 0, 0)):
        chosen = choose(speed)
        for strategy in ("checkpoint", "segment", "auto"):
            assert seconds(deep, 32, chosen, speed) <= seconds(deep, 32, strategy, speed)


@pytest.fixture(scope="module")
def low_gamma() -> nn.Module:
    """Needs much side information."""
    with torch.device("meta"):
        return momconv.convert(build("cifar_resnet32"), 0.1, stages="all").train()


def plan_at(model: nn.Module, limit: int, slowness: dict[str, float], **asked: Any) -> Any:
    """The plan where a byte takes so long in each precision."""
    speeds = {name: Speed(0, 0, seconds, is_measured=True) for name, seconds in slowness.items()}
    request = Request(SIDE, batch_size=5, memory=limit, **asked)
    return search(model, request, lambda training, _: speeds[training.precision])


def test_where_more_fits_gamma_changes_or_precision_whichever_is_faster(
    low_gamma: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some processors need so much scratch in bf16 that no more images fit.
    monkeypatch.setattr("momconv.planner.prediction.peak_within", lambda *_: 0)
    in_bf16 = peak_memory(low_gamma, 5, SIDE, "bf16", strategy="momentum").total
    with torch.device("meta"):
        larger = momconv.convert(build("cifar_resnet32"), 0.95, stages="all").train()
    limit = int(max(peak_of(larger, 5, "momentum"), in_bf16) * 1.0102)
    slow, quick = {"fp32": 1e-9, "bf16": 1e-8}, {"fp32": 1e-8, "bf16": 1e-9}
    for allowed, speeds, gamma, precision, sizes in (
        ([], quick, None, "fp32", (3, 2)),
        (["gamma"], quick, 0.95, "fp32", (5,)),
        (["precision"], slow, None, "bf16", (5,)),
        (["precision", "gamma"], slow, 0.95, "fp32", (5,)),
        (["precision", "gamma"], quick, None, "bf16", (5,)),
    ):
        asked: dict[str, Any] = {"strategy": "momentum", "may_change": allowed}
        made = plan_at(low_gamma, limit, speeds, **asked)
        assert (made.gamma, made.precision, made.sizes) == (gamma, precision, sizes)
    assert {stage.gamma for stage in momentum_stages(low_gamma).values()} == {0.1}


def test_where_all_fits_only_a_faster_precision_is_a_change(low_gamma: nn.Module) -> None:
    for slowness, precision in ((0.9e-9, "bf16"), (2e-9, "fp32")):
        speeds = {"fp32": 1e-9, "bf16": slowness}
        made = plan_at(low_gamma, 2**33, speeds, may_change=["precision", "gamma"])
        assert (made.gamma, made.precision, made.strategy) == (None, precision, "store")
    assert plan(low_gamma, SIDE, 2**33, may_change=["gamma"]).gamma is None


def test_a_change_that_hardly_saves_time_is_not_made(low_gamma: nn.Module) -> None:
    """With a larger γ there are fewer bytes to keep, which takes a little less time."""
    limit = int(peak_of(low_gamma, 5, "auto") * 1.0102)
    made = plan(low_gamma, SIDE, limit, batch_size=5, may_change=["gamma"])
    assert (made.gamma, made.sizes) == (None, (5,))
    stages = momentum_stages(low_gamma).values()
    own = Predictor(low_gamma, Training(SIDE)).predict(5, "auto").work
    for stage in stages:
        stage.gamma = 0.95
    larger = Predictor(low_gamma, Training(SIDE)).predict(5, "auto").work
    for stage in stages:
        stage.gamma = 0.1
    assert larger.bytes < own.bytes


def test_what_was_measured_decides_among_strategies_alone() -> None:
    """So that a run can be repeated: without BatchNorm a faster device would take smaller parts."""
    with torch.device("meta"):
        model = momconv.convert(build("cifar_resnet20"), 0.1, stages="all").train()
    start_training(model, TrainRecipe(freeze_bn=True))
    limit = room_for(model, 20, "checkpoint")
    speeds = (Speed(0, 0, 1e-9), Speed(1e-3, 0, 0), Speed(0, 1e-9, 0), Speed(1, 1e-9, 1e-3))
    request = Request(SIDE, batch_size=32, memory=limit)
    made = [search(model, request, lambda *_, s=speed: s) for speed in speeds]
    assert len({(p.micro_batch, p.gamma, p.precision) for p in made}) == 1


# Nothing fits


def refusal(model: nn.Module, memory: int, **changes: Any) -> ResourceError:
    with pytest.raises(ResourceError) as refused:
        plan(model, SIDE, memory, **changes)
    assert refused.value.kind == "memory.does_not_fit"
    return refused.value


def test_a_leaner_state_is_advised_with_what_it_needs_and_released_gradients_too() -> None:
    model = build("cifar_resnet20").train()
    small = peak_memory(model, 1, SIDE, optimizer="adamw-8bit").total
    leanest = peak_memory(model, 1, SIDE, optimizer="adamw-8bit", release_gradients=True).total
    error = refusal(model, int(small * 1.02), batch_size=1, optimizer="adamw")
    assert f"with --optimizer adamw-8bit: {format_bytes(small)}" in error.message
    first, *_ = (error.fix or "").splitlines()
    assert first == "--optimizer adamw-8bit"
    error = refusal(model, int(leanest * 1.02), batch_size=1, optimizer="adamw-8bit")
    both = "--set train.release_gradients=true"
    assert f"with {both}: {format_bytes(leanest)}" in error.message
    assert both in (error.fix or "").splitlines()


def test_what_saves_memory_alone_changes_only_where_memory_asks_for_it() -> None:
    model = build("cifar_resnet20").train()
    allowed: Any = {"may_change": ["release_gradients", "optimizer"], "optimizer": "adamw"}
    unchanged = plan(model, SIDE, "1GiB", 4, **allowed)
    assert (unchanged.request.optimizer, unchanged.request.release_gradients) == ("adamw", False)
    limit = int(peak_memory(model, 4, SIDE, optimizer="adamw", release_gradients=True).total * 1.02)
    released = plan(model, SIDE, limit, 4, **allowed)
    assert (released.request.optimizer, released.sizes) == ("adamw", (4,))
    assert released.request.release_gradients
    assert released.peak is not None
    assert released.peak.gradients == 0


def test_micro_batches_are_advised_where_released_gradients_need_the_whole_batch() -> None:
    with torch.device("meta"):
        model = momconv.convert(build("cifar_resnet20")).train()
    limit = int(peak_memory(model, 2, SIDE, strategy="auto").total * 1.02)
    error = refusal(model, limit, batch_size=32, release_gradients=True)
    assert "--set train.release_gradients=auto" in (error.fix or "").splitlines()
    assert plan(model, SIDE, limit, 32).micro_batch == 2


def test_a_batch_whose_gradients_are_released_is_undivided() -> None:
    request = Request(SIDE, images=9, batch_size=4, release_gradients=True)
    assert request.sizes == [5]  # the last one of the epoch
    assert replace(request, images=8).sizes == [4]


def test_every_advice_fits() -> None:
    model, side = build("cifar_resnet20").train(), 128
    limit = peak_memory(model, 1, side).total * 4 // 5
    with pytest.raises(ResourceError, match="micro-batch of 1 image does not fit") as refused:
        plan(model, side, limit)
    assert "weights 1.0 MiB · gradients 1.0 MiB · optimizer 1.0 MiB" in refused.value.message
    precision, memory, smaller, frozen = (refused.value.fix or "").splitlines()
    assert precision == "--set train.precision=bf16"
    assert plan(model, side, limit, precision="bf16").micro_batch == 1
    assert plan(model, side, memory.removeprefix("--memory ")).micro_batch == 1
    assert plan(model, int(smaller.removeprefix("--resolution ")), limit).micro_batch == 1
    freeze(model, frozen.removeprefix("--freeze ").split(" --freeze "))
    assert plan(model, side, limit).micro_batch == 1


def test_a_smaller_resolution_is_advised() -> None:
    model = build("cifar_resnet20").train()
    limit = peak_memory(model, 1, 64).total + MIB
    with pytest.raises(ResourceError) as refused:
        plan(model, 256, limit)
    (side,) = re.findall(r"--resolution (\d+)", refused.value.fix or "")
    assert 64 <= int(side) < 256
    assert plan(model, int(side), limit).micro_batch >= 1


def test_a_leaner_strategy_and_smaller_parts_are_advised(deep: nn.Module) -> None:
    limit = room_for(deep, 32, "auto")
    assert "--strategy auto" in (refusal(deep, limit, strategy="store", micro_batch=32).fix or "")
    fixes = refusal(deep, limit, strategy="store", micro_batch=32).fix or ""
    assert "--micro-batch auto" in fixes
    assert plan(deep, SIDE, limit, strategy="store").micro_batch < 32


def test_frozen_stages_and_a_larger_gamma_are_advised_where_they_are_enough() -> None:
    """The numbers are predicted for a changed network, which is then as it was."""
    with torch.device("meta"):
        model = momconv.convert(build("cifar_resnet56"), 0.1).train()
    modes = read_modes(model)
    limit = int(peak_of(model, 32, "momentum") * 0.98)
    error = refusal(model, limit, strategy="momentum", micro_batch=32)
    assert modes == read_modes(model)
    assert {stage.gamma for stage in momentum_stages(model).values()} == {0.1}
    (gamma,) = re.findall(r"--gamma ([\d.]+)", error.fix or "")
    names = re.findall(r"--freeze (\w+)", error.fix or "")
    frozen = copy.deepcopy(model)
    freeze(frozen, names)
    for stage in momentum_stages(model).values():
        stage.gamma = float(gamma)
    assert max(peak_of(changed, 32, "momentum") for changed in (frozen, model)) <= limit


def test_what_cannot_be_changed_is_not_advised() -> None:
    with torch.device("meta"):
        model = momconv.convert(build("cifar_resnet56"), 0.1).train()
    peak = peak_memory(model, 32, SIDE, "bf16", strategy="momentum").total
    request = Request(
        SIDE,
        "bf16",
        batch_size=32,
        memory=int(peak * 0.98),
        micro_batch=32,
        strategy="momentum",
    )
    with pytest.raises(ResourceError) as refused:
        search(model, replace(request, fixed=get_args(Fixed)))
    options = [line.split()[0] for line in (refused.value.fix or "").splitlines()]
    assert options == ["--micro-batch", "--memory"]


def test_stages_to_freeze_have_the_names_that_freeze_knows() -> None:
    """A vision transformer has its blocks inside, and takes images of one size."""
    with torch.device("meta"):
        plain = build("vit_b_32")
        layers = plain.get_submodule("encoder.layers")
        assert isinstance(layers, nn.Sequential)
        plain.get_submodule("encoder").layers = layers[:4]  # takes less time than all twelve
        model, frozen = (momconv.convert(plain).train() for _ in range(2))
    freeze(frozen, ["stem"])
    needed = peak_memory(frozen, 1, 224, strategy="segment").total
    for spare, stages in ((1, "stem"), (-4, "stem --freeze encoder.layers.encoder_layer_0")):
        with pytest.raises(ResourceError) as refused:
            plan(model, 224, int(needed * 1.0102) + spare * MIB, batch_size=1)
        assert f"--freeze {stages}" in (refused.value.fix or "").splitlines()
        assert "--resolution" not in (refused.value.fix or "")


def test_momentum_without_gamma_is_refused() -> None:
    with pytest.raises(UsageError, match="gamma is 0"):
        plan(momconv.convert(build("cifar_resnet20"), 0), SIDE, "1GiB", strategy="momentum")


@pytest.mark.usefixtures("two_threads")
def test_three_gibibytes_hold_twenty_four_images_at_once_instead_of_two() -> None:
    """Weights, gradients, the optimiser's state and the images, as bytes, are in the 3 GiB."""
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "three-gib.yaml")
    side, memory = 500, "3GiB"
    assert (recipe.data.resolution, recipe.train.memory) == (side, memory)
    with torch.device("meta"):
        plain = build(recipe.model.name).train().to(memory_format=torch.channels_last)
        model = momconv.convert(plain, recipe.momentum.gamma)
    batch = recipe.train.batch_size
    made = search(model, Request(side, memory=memory, batch_size=batch, as_bytes=True))
    assert made.sizes == (24,)
    assert seconds(model, 24, made.strategy, side=side) <= seconds(model, 24, "auto", side=side)
    limit = parse_bytes(memory)
    assert peak_memory(plain, 2, side).total < limit < peak_memory(plain, 3, side).total

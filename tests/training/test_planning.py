import json
from dataclasses import replace

import pytest
import runs
import torch
from torch import nn

from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.planner import plan as plans
from momconv.planner import speed
from momconv.planner.plan import Plan, Request
from momconv.planner.prediction import peak_memory
from momconv.recipe import TrainRecipe
from momconv.surgery.conversion import convert
from momconv.training import planning
from momconv.training.network import start_training
from momconv.training.planning import plan_again, plan_batches, warn_of_noise
from momconv.zoo.networks import build

REQUEST = replace(runs.REQUEST, images=100, batch_size=16, micro_batch="auto", strategy="auto")
PLAN = replace(runs.PLAN, request=REQUEST, micro_batch=16)


@pytest.fixture(autouse=True)
def measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "measure_speed", speed.measure_speed)


@pytest.fixture
def model() -> nn.Module:
    return convert(build("cifar_resnet20"), 0.9).train()


def limited(model: nn.Module, images: int, strategy: str) -> Request:
    """Room for so many images under a strategy, and not much more."""
    peak = peak_memory(model, images, 32, strategy=strategy)  # type: ignore[arg-type]
    return replace(REQUEST, memory=str(int(peak.total * 1.02)))


def test_with_memory_to_spare_everything_is_stored(model: nn.Module) -> None:
    plan = plan_batches(model, REQUEST)
    assert (plan.sizes, plan.strategy, plan.stages) == ((16,), "store", "store")
    assert plan.predicted_bytes == peak_memory(model, 16, 32).total < plan.limit_bytes
    assert {stage.strategy for stage in momentum_stages(model).values()} == {"store"}


def test_the_headroom_is_kept_back_of_what_is_free(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plans, "available_bytes", lambda _, headroom: int(2**30 * (1 - headroom)))
    usual, wary = (replace(REQUEST, headroom=part).find_limit(model) for part in (0.25, 0.5))
    assert usual - wary == 2**28


def test_the_network_gets_the_leaner_strategy_that_fits(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "time_step", lambda _model, images, *_: images / 1000)
    plan = plan_batches(model, limited(model, 16, "auto"))
    assert plan.sizes == (16,)
    assert plan.strategy != "store"
    assert "momentum" in plan.stages or "checkpoint" in plan.stages
    assert {stage.strategy for stage in momentum_stages(model).values()} != {"store"}
    assert plan.is_calibrated  # as strategies had to be compared
    assert str(plan).endswith(" images/s")


def test_a_strategy_that_is_asked_for_is_kept(model: nn.Module) -> None:
    plan = plan_batches(model, replace(limited(model, 6, "store"), strategy="store"))
    assert plan.strategy == "store"
    assert plan.sizes in ((6, 5, 5), (4, 4, 4, 4))


def test_a_number_that_does_not_fit_is_refused(model: nn.Module) -> None:
    asked = replace(limited(model, 2, "auto"), micro_batch=16)
    with pytest.raises(ResourceError, match="micro-batch of 16 images does not fit"):
        plan_batches(model, asked)
    assert plan_batches(model, replace(REQUEST, micro_batch=6)).sizes == (6, 5, 5)
    assert plan_batches(model, replace(REQUEST, micro_batch=99)).micro_batch == 16


def test_single_images_are_refused_where_batchnorm_cannot_take_them() -> None:
    shrinking = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()
    ).train()
    with pytest.raises(UsageError, match="micro-batches of 1 image"):
        plan_batches(shrinking, replace(REQUEST, micro_batch=1))
    assert plan_batches(shrinking, replace(REQUEST, micro_batch=2)).micro_batch == 2


def test_planning_leaves_values_as_they_were(model: nn.Module) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan_batches(model, REQUEST)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_plan_survives_its_file() -> None:
    plan = replace(PLAN, micro_batch=6, measured_bytes=11)
    apart = replace(plan, strategy={"layer1": "momentum+store:2", "layer2": "checkpoint:3"})
    assert [Plan.from_json(one.to_json()) for one in (plan, apart)] == [plan, apart]
    assert json.loads(plan.to_json())["sizes"] == [6, 5, 5]
    with pytest.raises(ModelFileError):
        Plan.from_json("{}")


def test_the_file_has_the_names_that_it_has_always_had() -> None:
    """So that runs of earlier versions go on by their plans."""
    document = json.loads(PLAN.to_json())
    assert document["setting"]["memory"] is None
    assert document["predicted_bytes"] == 2**20
    assert document["predicted_seconds"] is None
    assert "peak" not in document


# Going on


def test_a_run_that_goes_on_keeps_its_plan_while_it_fits(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(planning, "search")
    plan = replace(PLAN, strategy="checkpoint")
    assert plan_again(plan, REQUEST, model) == plan
    assert {stage.strategy for stage in momentum_stages(model).values()} == {"checkpoint"}


def test_with_less_memory_the_micro_batch_stays_and_the_strategy_becomes_leaner(
    model: nn.Module,
) -> None:
    """As BatchNorm sees the micro-batch, but values do not depend on the strategy."""
    before = plan_batches(model, REQUEST)
    request = limited(model, 16, "auto")
    after = plan_again(before, request, model)
    assert (after.micro_batch, after.request) == (before.micro_batch, request)
    assert after.strategy != before.strategy


def test_with_much_less_memory_the_micro_batch_becomes_smaller(model: nn.Module) -> None:
    after = plan_again(PLAN, limited(model, 4, "segment"), model)
    assert 4 <= after.micro_batch < 16


def test_with_more_memory_the_micro_batch_stays(model: nn.Module) -> None:
    before = replace(PLAN, request=replace(REQUEST, memory="5MiB"), micro_batch=4)
    assert plan_again(before, REQUEST, model).sizes == (4, 4, 4, 4)


def test_halving_stops_where_parts_would_not_become_smaller() -> None:
    assert PLAN.halve(fewest=1) == replace(PLAN, micro_batch=8)
    pairs = replace(PLAN, request=replace(REQUEST, batch_size=5, images=5), micro_batch=3)
    assert pairs.halve(fewest=2) is None  # of five images in pairs one part has three
    assert pairs.halve(fewest=1) == replace(pairs, micro_batch=1)
    assert replace(PLAN, micro_batch=1).halve(fewest=1) is None


# What is told


def test_few_images_under_batchnorm_are_warned_of(model: nn.Module) -> None:
    few = replace(PLAN, micro_batch=4)
    assert "only 4 of 16 images" in (warn_of_noise(few, model) or "")
    assert "--freeze-bn" in (warn_of_noise(few, model) or "")
    assert warn_of_noise(replace(PLAN, micro_batch=8), model) is None
    assert warn_of_noise(replace(few, request=replace(REQUEST, batch_size=4)), model) is None
    start_training(model, TrainRecipe(freeze_bn=True))
    assert warn_of_noise(few, model) is None


def test_the_choice_is_told_in_a_line() -> None:
    plan = replace(PLAN, request=replace(REQUEST, memory="1GiB"), micro_batch=6)
    assert str(plan) == (
        "batch of 16 in 3 micro-batches of 6 or 5 (store, fp32), 1.0 MiB predicted at the peak; "
        "the limit is 1.0 GiB"
    )
    assert str(PLAN).startswith("batch of 16 in one micro-batch (store, fp32), 1.0 MiB")
    assert str(PLAN).endswith("what is free is 1.0 GiB")
    quick = replace(PLAN, seconds_per_image=0.00032, is_calibrated=True)
    assert str(quick).endswith("; about 3,125 images/s")
    slow = replace(PLAN, seconds_per_image=3.205, is_calibrated=True)
    assert str(slow).endswith("; about 0.312 images/s")

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from momconv.errors import ModelFileError, ResourceError, UsageError
from momconv.planner.measurement import measure_step, static_bytes
from momconv.training import planning
from momconv.training.planning import BatchPlan, Setting, plan_batches, still_holds
from momconv.zoo.networks import build

CPU = torch.device("cpu")
SETTING = Setting(
    images=100,
    batch_size=16,
    micro_batch="auto",
    resolution=32,
    strategy="store",
    precision="fp32",
    optimizer="sgd",
    device="cpu",
    memory=None,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("cifar_resnet20").train()


def bytes_of(model: nn.Module, images: int) -> int:
    step = measure_step(model, images, 32, precision="fp32", device=CPU).peak_bytes
    return step + images * 3 * 32 * 32 * 4 + static_bytes(model, "sgd").total


def test_with_memory_to_spare_the_batch_stays_whole(model: nn.Module) -> None:
    plan = plan_batches(model, SETTING, CPU)
    assert plan.sizes == [16]
    assert plan.measured_bytes == bytes_of(model, 16)
    assert plan.limit_bytes is not None
    assert plan.limit_bytes > plan.measured_bytes


def test_under_a_limit_the_largest_micro_batch_that_fits_is_taken(model: nn.Module) -> None:
    limit = bytes_of(model, 6)
    plan = plan_batches(model, replace(SETTING, memory=str(limit)), CPU)
    assert plan.limit_bytes == limit
    assert plan.measured_bytes is not None
    assert bytes_of(model, 4) < plan.measured_bytes <= limit < bytes_of(model, 8)
    assert plan.sizes in ([6, 5, 5], [4, 4, 4, 4])  # the line may be a little high


def test_a_limit_below_one_image_is_refused_with_advice(model: nn.Module) -> None:
    with pytest.raises(ResourceError, match="micro-batch of 1 image does not fit") as refused:
        plan_batches(model, replace(SETTING, memory="3MiB"), CPU)
    assert "train.memory" in str(refused.value.fix)


def test_a_line_that_is_too_low_is_corrected_by_a_measured_step(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peaks with a bend: 1 MiB an image up to three, then 3 MiB."""
    asked = []

    def measure(_model: Any, images: int, _resolution: int, **_: Any) -> SimpleNamespace:
        asked.append(images)
        return SimpleNamespace(peak_bytes=2**20 * (images + 2 * max(0, images - 3)))

    monkeypatch.setattr(planning, "measure_step", measure)
    monkeypatch.setattr("momconv.planner.measurement.measure_step", measure)
    limit = static_bytes(model, "sgd").total + 20 * 2**20
    plan = plan_batches(model, replace(SETTING, memory=str(limit)), CPU)
    assert asked[:3] == [2, 3, 16]
    assert plan.micro_batch == asked[-1] < 16
    assert plan.measured_bytes is not None
    assert plan.measured_bytes <= limit
    assert plan.predicted_bytes is not None
    assert plan.predicted_bytes < static_bytes(model, "sgd").total + measure(0, 16, 0).peak_bytes


def test_a_number_is_taken_without_measuring(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(planning, "measure_step")
    plan = plan_batches(model, replace(SETTING, micro_batch=6), CPU)
    assert (plan.sizes, plan.measured_bytes) == ([6, 5, 5], None)
    assert plan_batches(model, replace(SETTING, micro_batch=99), CPU).micro_batch == 16


def test_single_images_are_refused_where_batchnorm_cannot_take_them() -> None:
    shrinking = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4), nn.Flatten()
    ).train()
    with pytest.raises(UsageError, match="micro-batches of 1 image"):
        plan_batches(shrinking, replace(SETTING, micro_batch=1), CPU)
    assert plan_batches(shrinking, replace(SETTING, micro_batch=2), CPU).micro_batch == 2


def test_planning_leaves_the_network_as_it_was() -> None:
    model = build("cifar_resnet20").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan_batches(model, SETTING, CPU)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_plan_survives_its_file() -> None:
    plan = BatchPlan(SETTING, 6, 10, 11, 12)
    assert BatchPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["sizes"] == [6, 5, 5]
    with pytest.raises(ModelFileError):
        BatchPlan.from_json("{}")


def test_a_run_that_goes_on_keeps_its_plan_while_it_fits(model: nn.Module) -> None:
    plan = BatchPlan(SETTING, 16, 10, 2**20, 2**30)
    assert still_holds(plan, SETTING, model, CPU)
    assert not still_holds(plan, replace(SETTING, memory="3GiB"), model, CPU)
    assert not still_holds(replace(plan, measured_bytes=2**60), SETTING, model, CPU)
    asked = replace(SETTING, micro_batch=4)
    assert still_holds(BatchPlan(asked, 4), asked, model, CPU)


def test_the_choice_is_told_in_a_line() -> None:
    limited = replace(SETTING, memory="3GiB")
    assert str(BatchPlan(limited, 6, 1, 2**30, 3 * 2**30)) == (
        "batch of 16 in 3 micro-batches of 6 or 5 (store, fp32), 1.0 GiB at the peak; "
        "the limit is 3.0 GiB"
    )
    assert str(BatchPlan(replace(SETTING, micro_batch=16), 16)) == (
        "batch of 16 in one micro-batch (store, fp32), as asked for"
    )

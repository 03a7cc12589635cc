"""How well times are predicted is for benchmarks/cost.py to say."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vision_transformer import VisionTransformer

import momconv
from momconv.momentum.sequential import momentum_stages
from momconv.planner.cost import Speed, Work, count_work, estimate_speed
from momconv.planner.measurement import time_step
from momconv.planner.prediction import Predictor, Training
from momconv.planner.speed import measure_speed
from momconv.zoo.networks import build

aten = torch.ops.aten
CPU = torch.device("cpu")


def work_of(model: nn.Module, images: int, side: int, strategy: Any = None) -> Work:
    return Predictor(model.train(), Training(side)).predict(images, strategy).work


@pytest.mark.parametrize(
    ("model", "side"),
    [
        (build("cifar_resnet20"), 32),
        (VisionTransformer(32, 16, 1, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3), 32),
    ],
)
def test_arithmetic_is_that_which_pytorch_counts(model: nn.Module, side: int) -> None:
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(2, 3, side, side)).sum().backward()
    assert work_of(model, 2, side).flops == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_each_group_of_a_convolution_has_only_its_own_channels() -> None:
    x, weight = torch.empty(1, 8, 4, 4), torch.empty(8, 1, 1, 1)
    settings = ([1, 1], [0, 0], [1, 1], False, [0, 0], 8)
    forward = count_work(aten.convolution.default, (x, weight, None, *settings), [x])
    assert forward == Work(1, 2 * 8 * 16, 4 * (128 + 8 + 128))
    args = (x, x, weight, None, *settings, [True, True, False])
    assert count_work(aten.convolution_backward.default, args, [x, weight]).flops == 4 * 8 * 16


def test_looking_at_a_tensor_in_another_way_is_no_work() -> None:
    x = torch.empty(4)
    for view in (aten.detach.default, aten.empty_like.default):
        assert count_work(view, (x,), [x]) == Work()
    assert count_work(aten.add_.Tensor, (x, 1), [x]) == Work(1, 0, 32)


def test_to_recompute_is_more_work_and_twice_the_images_are_twice_the_work() -> None:
    model = momconv.convert(build("cifar_resnet20"), stages="all")
    store, checkpoint, segment = (
        work_of(model, 4, 16, strategy) for strategy in ("store", "checkpoint", "segment")
    )
    assert store.flops < checkpoint.flops < segment.flops
    assert store.operations < checkpoint.operations < segment.operations
    double = work_of(model, 8, 16, "store")
    assert double.operations == store.operations
    assert double.flops == 2 * store.flops
    assert double.bytes == pytest.approx(store.scale(2).bytes, rel=0.1)  # but for the weights


def test_a_clock_that_is_too_coarse_still_gives_a_speed() -> None:
    guess = Speed(1e-5, 1e-9, 1e-9)
    for less, more in ((2.0, 1.0), (1.0, 9.0)):  # slower with few images; starting takes no time
        speed = guess.fit((Work(2, 10, 10), less), (Work(2, 20, 20), more))
        assert speed.per_operation == 0
        assert speed.seconds(Work(2, 20, 20)) == pytest.approx(more)


def test_a_calibrated_speed_is_measured_and_the_network_stays_as_it_was() -> None:
    model = momconv.convert(build("cifar_resnet20"), 0.9).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    speed = measure_speed(model, Training(32), 2**30)
    assert speed.is_measured
    assert speed.per_flop > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert {stage.strategy for stage in momentum_stages(model).values()} == {"store"}


class Flat(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(12, 4))


@pytest.mark.parametrize(("per_image", "most"), [(0.0, 256), (0.0005, 256), (0.05, 4)])
def test_a_speed_is_fitted_to_steps_that_differ(
    per_image: float, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where launching operations takes all the time, images are added; in vain, it is estimated."""
    ran: list[int] = []

    def time_step(_: nn.Module, images: int, *__: object) -> float:
        ran.append(images)
        return 0.05 + (0.0002 if len(ran) % 2 else -0.0002) + per_image * images

    monkeypatch.setattr("momconv.planner.speed.time_step", time_step)
    speed = measure_speed(Flat(), Training(2), 2**30)
    assert ran[-1] == most
    if per_image:
        assert speed.is_measured
        work = Predictor(Flat(), Training(2)).predict(1000).work
        assert speed.seconds(work) == pytest.approx(0.05 + 1000 * per_image, rel=0.1)
    else:
        assert speed == estimate_speed("cpu", "fp32")


def test_a_gpu_that_works_while_operations_are_launched_is_not_taken_for_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def time_step(_: nn.Module, images: int, *__: object) -> float:
        return max(0.05, 0.0014 * images)

    monkeypatch.setattr("momconv.planner.speed.time_step", time_step)
    work = Predictor(Flat(), Training(2)).predict(1000).work
    speed = measure_speed(Flat(), Training(2), 2**30)
    assert speed.seconds(work) == pytest.approx(1.4, rel=0.2)


def test_a_step_that_is_disturbed_is_timed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 9.0, 10.0, 17.0, 20.0, 21.0])  # to warm up, while something else ran, alone
    monkeypatch.setattr("momconv.planner.measurement.time.perf_counter", lambda: next(ticks))
    assert time_step(Flat(), 2, 2, "fp32", CPU) == 1.0


def test_steps_that_would_not_fit_are_not_run() -> None:
    model = build("cifar_resnet20").train()
    assert measure_speed(model, Training(32), 2**20) == estimate_speed("cpu", "fp32")

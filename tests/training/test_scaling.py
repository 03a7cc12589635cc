"""The scaler works on CPUs too, though nobody wants it there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import PLAN, SETTING, make_job, small
from test_loop import gradients
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from momconv.errors import MomconvError, UsageError
from momconv.momentum.sequential import set_strategy
from momconv.surgery.conversion import convert
from momconv.training import loop
from momconv.training.averaging import Average
from momconv.training.finetuning import finetune
from momconv.training.gradients import take_step
from momconv.training.job import Job
from momconv.training.loop import _add_up, _Report, _step
from momconv.training.progress import Progress
from momconv.training.run_folder import RunFolder
from momconv.training.saving import save
from momconv.training.scaling import make_scaler, read_scaler, restore_scaler
from momconv.training.steps import Step
from momconv.zoo.networks import build

CPU = torch.device("cpu")
IMAGES, LABELS = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 0, 1])


def make_fp16_job(colours: Path, strategy: str) -> Job:
    torch.manual_seed(0)
    model = convert(build("cifar_resnet20", 3), 0.9).train()
    set_strategy(model, strategy)  # type: ignore[arg-type]  # it is one
    plan = replace(PLAN, setting=replace(SETTING, precision="fp16"), measured_bytes=1)
    return make_job(colours, model, "train.label_smoothing=0", plan=plan)


def add_up(job: Job) -> None:
    progress = Progress(
        lr_factor=0.5
    )  # as after a return to an earlier state, which is the only one
    step = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)]))
    assert _add_up(job, progress, step, _Report(job, progress), lambda: None) is not None


def test_under_fp16_gradients_have_their_own_size_and_momentum_stays_exact(colours: Path) -> None:
    found = []
    for strategy in ("store", "momentum"):
        job = make_fp16_job(colours, strategy)
        job.scaler = GradScaler("cpu", init_scale=2.0**10)
        add_up(job)
        found.append(gradients(job.model))
    assert all(map(torch.equal, *found))
    job.model.zero_grad()
    F.cross_entropy(job.model(IMAGES), LABELS).backward()  # in fp32
    for ours, theirs in zip(found[0], gradients(job.model), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.05)


def test_a_step_that_overflows_is_left_out_until_the_scale_is_exhausted(colours: Path) -> None:
    job = make_fp16_job(colours, "store")
    before = [parameter.clone() for parameter in job.model.parameters()]
    job.scaler = GradScaler("cpu", init_scale=2.0**126)
    add_up(job)
    take_step(job, 0.1)
    assert all(map(torch.equal, before, job.model.parameters()))
    assert job.scaler.get_scale() == 2.0**125
    job.scaler = GradScaler("cpu", init_scale=1.0)
    job.model.get_parameter("linear.weight").register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(MomconvError, match="a gradient is not finite"):
        add_up(job)


def test_after_a_return_to_an_earlier_state_gradients_are_scaled_again(
    colours: Path, tmp_path: Path
) -> None:
    job = replace(make_fp16_job(colours, "store"), folder=RunFolder(tmp_path))
    job.scaler = GradScaler("cpu", init_scale=1.0)
    progress = Progress()
    save(job, progress)
    hook = job.model.get_parameter("linear.weight").register_hook(lambda grad: grad * torch.inf)
    step = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)]))
    assert _add_up(job, progress, step, _Report(job, progress), lambda: None) is None
    hook.remove()
    add_up(job)
    take_step(job, 0.1)
    assert job.scaler.get_scale() == 1.0


def test_the_scale_is_part_of_the_state() -> None:
    scaler = make_scaler("fp16", CPU)
    scaler.load_state_dict(scaler.state_dict() | {"scale": 4096.0, "_growth_tracker": 7})
    again = make_scaler("fp16", CPU)
    restore_scaler(again, read_scaler(scaler))
    assert again.state_dict() == scaler.state_dict()
    assert read_scaler(make_scaler("bf16", CPU)) == {}


def test_a_cpu_refuses_fp16_before_anything_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fp16 is for GPUs, and the device is cpu"):
        finetune(small(tmp_path / "nowhere", "train.precision=fp16"), tmp_path / "run")


def test_memory_that_runs_out_between_unscaling_and_the_step_leaves_a_scaler_that_works(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = replace(make_fp16_job(colours, "store"), folder=RunFolder(tmp_path))
    job.scaler = GradScaler("cpu", init_scale=1024.0)
    progress = Progress()

    def exhaust(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_require_finite", exhaust)
        step = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)]))
        assert _add_up(job, progress, step, _Report(job, progress), lambda: None) is None
    assert job.scaler.get_scale() == 1024.0
    add_up(job)
    take_step(job, 0.1)


def test_memory_that_runs_out_in_the_average_is_no_end_under_fp16(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_fp16_job(colours, "store").model
    plan = replace(PLAN, setting=replace(SETTING, precision="fp16"), measured_bytes=1)
    job = replace(make_job(colours, model, "train.ema=0.9", plan=plan), folder=RunFolder(tmp_path))
    job.scaler = GradScaler("cpu", init_scale=1024.0)
    progress = Progress()
    save(job, progress)
    before = [parameter.detach().clone() for parameter in model.parameters()]

    def exhaust(*_: object) -> None:
        raise MemoryError

    step, loss = Step([0, 1, 2, 3, 4], iter([(IMAGES, LABELS)])), torch.zeros(())
    add_up(job)
    with monkeypatch.context() as patch:
        patch.setattr(Average, "update", exhaust)
        assert not _step(job, progress, step, loss, 0.0)
    assert all(map(torch.equal, before, model.parameters()))
    assert job.scaler.get_scale() == 1024.0
    add_up(job)
    assert _step(job, progress, step, loss, 0.0)

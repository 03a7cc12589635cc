"""Gradients that two processes sum during backward, and such as are used and freed in it."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from runs import Log, Signals, assert_same, assert_same_tensors, resume, small
from teams import Team, find_team
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

import momconv
from momconv import eightbit
from momconv.eightbit import AdamW8bit, SGD8bit
from momconv.errors import (
    MomconvError,
    NotReproducible,
    OutOfMemory,
    RangeOverflow,
    ResourceError,
    UsageError,
)
from momconv.planner.measurement import measure, run_step, static_bytes
from momconv.planner.prediction import peak_memory
from momconv.recipe import Recipe, load_recipe
from momconv.training import gradients, lockstep
from momconv.training.finetuning import finetune
from momconv.training.gradients import Buckets
from momconv.training.interruption import Interrupted
from momconv.training.processes import Processes, joined
from momconv.training.run import TrainingRun
from momconv.training.run_folder import RunFolder
from momconv.training.state import load_state
from momconv.training.steps import add_gradients
from momconv.vocabulary import OPTIMIZERS, OptimizerName
from momconv.zoo.networks import build

CPU = torch.device("cpu")
PLACES = ("before", "during", "after")
RELEASED = ["train.micro_batch=auto", "train.release_gradients=true"]
IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])


# Sums over processes


@pytest.fixture(scope="module")
def team() -> Team:
    return find_team()


def fail(_gradient: object = None) -> None:
    raise RangeOverflow("for once", kind="inversion.range_overflow")


def run_out(_gradient: object = None) -> None:
    raise torch.OutOfMemoryError


def train(recipe: Recipe, folder: Path, place: str = "", fault: Any = fail) -> tuple[int, int]:
    """Run, with small pieces and a fault at the third step of the second process.

    How many sums there were in all, and how many passes.
    """
    sums, passes = 0, 0

    def count(self: Processes, tensor: Tensor) -> Any:
        nonlocal sums
        sums += 1
        return begin(self, tensor)

    def add(run: TrainingRun, *args: Any) -> Tensor:
        nonlocal passes
        passes += 1
        is_due = passes == 3 and os.environ["RANK"] == "1"
        if is_due and place == "before":
            fault()
        first: Any = next(run.model.parameters())  # whose gradient is the last
        hook = first.register_hook(fault) if is_due and place == "during" else None
        try:
            loss = add_gradients(run, *args)
        finally:
            if hook:
                hook.remove()
        if is_due and place == "after":
            fault()
        return loss

    begin = Processes.begin_adding
    with (
        patch.object(gradients, "_BYTES", 2**17),
        patch.object(lockstep, "add_gradients", add),
        patch.object(lockstep, "has_to_measure", lambda *_: False),
        patch.object(Processes, "begin_adding", count),
    ):
        finetune(recipe, folder)
    return sums, passes


def test_after_a_fault_in_one_process_both_do_the_step_again(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    """Before, during and after its backward pass, when the other has sent some gradients or all."""
    recipe = small(colours, "train.epochs=1", "train.save_every=1000")
    (sums, first), (_, second) = team.do(train, recipe, tmp_path / "whole")
    pieces = sums // 4
    assert pieces > 5
    for place in PLACES:
        done = team.do(train, recipe, tmp_path / place, place)
        assert done[0][0] == done[1][0] == sums + pieces
        assert done[1][1] == second + 1
        assert_same_tensors(tmp_path / "whole", tmp_path / place)
    assert first > second  # the larger share has more micro-batches


def test_if_memory_runs_out_during_backward_both_take_smaller_parts(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    recipe = small(colours, "train.freeze_bn=true", "train.epochs=1")
    team.do(train, recipe, tmp_path / "run", "during", run_out)
    progress = load_state(RunFolder(tmp_path / "run").state).progress
    assert [(h.step, h.micro_batch) for h in progress.halvings] == [(3, 1)]
    assert progress.epoch == 1


def end(recipe: Recipe, folder: Path, place: str) -> str:
    """Start a run or go on with it, perhaps until memory runs out; what ended it."""
    try:
        if place:
            train(recipe, folder, place, run_out)
        else:
            finetune(recipe, folder, resume="auto")
    except ResourceError as error:
        return error.message
    return ""


def test_if_memory_runs_out_where_weights_change_both_go_on_once_they_are_started_again(
    team: Team, colours: Path, tmp_path: Path
) -> None:
    recipe, folder = small(colours, *RELEASED, "train.batch_size=8"), RunFolder(tmp_path)
    lost, exhausted = team.do(end, recipe, tmp_path, "during")
    assert "has lost another process" in lost
    assert "is kept, and goes on with micro-batches of 2" in exhausted
    assert load_state(folder.state).progress.epoch == 1
    assert team.do(end, recipe, tmp_path, "") == ["", ""]
    assert load_state(folder.state).progress.epoch == 2


def add_up(rank_without: int) -> list[list[float] | None]:
    """Gradients of a used, an unused and a frozen weight; one process has no pass to make."""
    with joined() as processes:
        model = nn.ParameterDict({name: nn.Parameter(torch.ones(2)) for name in "abc"})
        model["c"].requires_grad_(requires_grad=False)
        own = Buckets(processes)
        passes = 0 if processes.rank == rank_without else 2
        for _ in range(2):  # steps
            own.begin(model, passes)
            for _ in range(passes):
                (model["a"] * (1 + processes.rank)).sum().backward()
                own.end_pass()
            own.finish()
        return [None if p.grad is None else p.grad.tolist() for p in model.values()]


@pytest.mark.parametrize(("without", "total"), [(0, 4.0), (1, 2.0), (2, 6.0)])
def test_a_gradient_is_the_sum_of_all_passes_of_all_processes(
    team: Team, without: int, total: float
) -> None:
    """One that nobody has is none, as an optimiser would let a weight of 0 gradient decay."""
    expected = [[total, total], None, None]
    assert team.do(add_up, without) == [expected, expected]


def converted(strategy: str) -> nn.Module:
    torch.manual_seed(0)
    model = momconv.convert(build("cifar_resnet20"), stages="all").train()
    momconv.set_strategy(model, strategy)  # type: ignore[arg-type]
    return model


def optimizers(model: nn.Module) -> Iterator[Optimizer]:
    for kind in (SGD, AdamW):
        yield kind(model.parameters(), lr=0.01, fused=True)
    yield SGD8bit(model.parameters(), lr=0.01, momentum=0.9)
    yield AdamW8bit(model.parameters(), lr=0.01)


def add_late_and_measured() -> tuple[float, float]:
    """What is there once a sum has begun while memory is measured, and what the sum is."""
    with joined() as processes:
        if processes.rank == 1:
            time.sleep(0.5)
        number, begun = torch.ones(()), list[float]()

        def work() -> None:
            wait = processes.begin_adding(number)
            begun.append(number.item())
            wait()

        measure(work, CPU)
    return begun[0], number.item()


def test_no_sum_goes_on_when_a_measurement_ends(team: Team) -> None:
    """Its thread would tell a profiler that is gone."""
    assert team.do(add_late_and_measured) == [(2, 2), (2, 2)]


# Gradients that are released


@pytest.mark.parametrize("strategy", ["store", "checkpoint", "segment", "momentum"])
@pytest.mark.parametrize("number", range(4))
def test_a_step_in_backward_has_the_bits_of_one_after_it(number: int, strategy: str) -> None:
    models = []
    for is_released in (True, False):
        model = converted(strategy)
        optimizer = [*optimizers(model)][number]
        for _ in range(2):
            if is_released:
                with momconv.release_gradients(optimizer):
                    run_step(model, IMAGES, LABELS, "fp32")
            else:
                run_step(model, IMAGES, LABELS, "fp32")
                optimizer.step()
                optimizer.zero_grad()
        models.append(model.state_dict())
        assert all(p.grad is None for p in model.parameters())
    released, whole = models
    assert all(torch.equal(released[key], whole[key]) for key in whole)


def test_a_parameter_with_several_uses_changes_once_by_the_whole_gradient() -> None:
    weight = nn.Parameter(torch.tensor(3.0))
    optimizer = SGD([weight], lr=0.1)
    with momconv.release_gradients(optimizer):
        y = weight * 2
        (y * weight + weight).backward()  # 2 w² + w
    assert weight.item() == pytest.approx(3 - 0.1 * 13)
    (weight * 1.0).backward()  # outside it stays
    assert weight.item() == pytest.approx(3 - 0.1 * 13)
    assert weight.grad is not None


def test_groups_keep_their_own_rates_and_what_is_frozen_stays() -> None:
    first, second, frozen = (nn.Parameter(torch.tensor(1.0)) for _ in range(3))
    frozen.requires_grad = False
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": [second, frozen], "lr": 0.5}]
    optimizer = SGD(groups, lr=0.1)
    with momconv.release_gradients(optimizer):
        optimizer.param_groups[0]["lr"] = 0.25
        (first + second + frozen).backward()
        assert [p.item() for p in (first, second, frozen)] == [0.75, 0.5, 1.0]
        optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
        optimizer.param_groups[1]["lr"] = 0.25
        (first + second + frozen).backward()
    assert [p.item() for p in (first, second, frozen)] == [0.5, 0.25, 1.0]
    assert len(optimizer.param_groups) == 2


def test_an_optimiser_that_takes_all_gradients_at_once_is_refused() -> None:
    with pytest.raises(UsageError, match="LBFGS takes all gradients at once"):
        momconv.release_gradients(LBFGS([nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "sgd"])
def test_the_peak_is_predicted(optimizer: str) -> None:
    model = converted("momentum")
    made = AdamW8bit if optimizer == "adamw-8bit" else SGD
    with momconv.release_gradients(made(model.parameters(), lr=0.1, **_momentum(optimizer))):
        run_step(model, IMAGES, LABELS, "fp32")  # begins with the state
        measured = measure(lambda: run_step(model, IMAGES, LABELS, "fp32"), CPU)
    asked: Any = {"optimizer": optimizer, "release_gradients": True}
    peak = peak_memory(model, 4, 32, "fp32", **asked)
    static = static_bytes(model, **asked)
    whole = static.total + IMAGES.nbytes + LABELS.nbytes + measured
    assert peak.gradients == 0
    assert peak.total == pytest.approx(whole, rel=0.01)


class Typed(nn.Sequential):
    """It takes images as values of its weights' type."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(next(self.parameters()).dtype))  # type: ignore[no-any-return, no-untyped-call]


@pytest.mark.parametrize("optimizer", ["adamw-8bit", "sgd-8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_has_what_steps_need_where_no_loop_serves(
    optimizer: OptimizerName, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eightbit.optimizers, "_has_loops", lambda: dtype != torch.float32)
    layers = nn.Linear(3072, 400), nn.ReLU(), nn.Linear(400, 800), nn.ReLU(), nn.Linear(800, 10)
    model, row = Typed(nn.Flatten(), *layers).to(dtype), OPTIMIZERS[optimizer]
    made = getattr(eightbit, row.class_name)(model.parameters(), lr=0.1, **row.arguments(0.9))
    with momconv.release_gradients(made):
        run_step(model, IMAGES, LABELS, "fp32")  # begins with the state
        measured = measure(lambda: run_step(model, IMAGES, LABELS, "fp32"), CPU)
    peak = peak_memory(model, 4, 32, optimizer=optimizer, release_gradients=True)
    assert peak.operation == "step"
    assert peak.step == pytest.approx(measured, rel=0.001)


def _momentum(optimizer: str) -> dict[str, Any]:
    return {"momentum": 0.9, "fused": True} if optimizer == "sgd" else {}


# Runs that release them


@pytest.fixture(scope="module")
def whole(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released") / "run"
    finetune(small(colours, *RELEASED), folder)
    return folder


def test_a_run_with_released_gradients_has_the_bits_of_one_without(
    whole: Path, colours: Path, tmp_path: Path
) -> None:
    finetune(small(colours, "train.micro_batch=auto", "train.release_gradients=false"), tmp_path)
    assert_same_tensors(whole, tmp_path)


def test_a_run_that_is_interrupted_and_resumed_has_the_same_bits(
    whole: Path, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        finetune(small(colours, *RELEASED), tmp_path / "run", listener=Signals(3))
    resume(tmp_path / "run")
    assert_same(whole, tmp_path / "run")


@pytest.mark.parametrize("kind", [OutOfMemory, NotReproducible])
def test_after_a_failure_within_backward_it_goes_on_from_its_last_saved_state(
    kind: type[MomconvError], colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(small(colours, "train.micro_batch=2"), tmp_path / "other")
    change, calls = gradients._change, 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 160:  # in the middle of the third step
            raise kind("it failed", kind="test")
        change(*args)

    monkeypatch.setattr(gradients, "_change", fail)
    finetune(small(colours, *RELEASED), tmp_path / "run")
    assert calls == 160  # then gradients have to add up
    assert_same_tensors(tmp_path / "run", tmp_path / "other")


def test_a_gradient_that_is_not_finite_is_undone(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finetune(small(colours, *RELEASED, "train.lr=0.005"), tmp_path / "other")
    calls = 0

    def spoil(run: Any, images: Tensor, labels: Tensor, share: float, seek: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return add_gradients(run, images * torch.inf if calls == 2 else images, labels, share, seek)

    monkeypatch.setattr("momconv.training.lockstep.add_gradients", spoil)
    log = Log()
    finetune(small(colours, *RELEASED, "train.lr=0.01"), tmp_path / "run", listener=log)
    assert any("going back to epoch 1, step 0" in told for told in log.told)
    assert_same_tensors(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("other", ["train.clip=1", "train.micro_batch=2", "train.precision=fp16"])
def test_what_needs_all_gradients_keeps_them(other: str, colours: Path) -> None:
    with pytest.raises(UsageError, match="needs the whole batch at once"):
        load_recipe(None, [*RELEASED, other])
    assert not load_recipe(None, [other]).train.can_release_gradients

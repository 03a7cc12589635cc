import contextlib
import itertools
import json
import math
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deep
import pytest
import torch
from runs import (
    PLAN,
    REQUEST,
    Copies,
    Log,
    Signals,
    assert_same,
    assert_same_tensors,
    make_run,
    read_metrics,
    small,
)
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import get_total_norm
from torch.optim import SGD

from momconv.errors import NotReproducible, OutOfMemory, ResourceError
from momconv.evaluation import evaluate
from momconv.files.model_file import load
from momconv.momentum import sequential
from momconv.momentum.sequential import momentum_stages
from momconv.training import memory, saving, validation
from momconv.training import steps as work
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.training.optimisation import make_optimizer
from momconv.training.progress import Progress
from momconv.training.run_folder import RunFolder
from momconv.training.saving import write_history
from momconv.training.steps import add_gradients, take_step
from momconv.zoo.networks import build

CPU = torch.device("cpu")


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("sizes", [(7,), (4, 3), (3, 2, 2), (5, 1, 1)])
def test_micro_batches_of_any_sizes_add_up_to_the_gradient_of_the_mean(
    colours: Path, sizes: tuple[int, ...]
) -> None:
    """In eval mode, where an image does not depend on the others, and in double precision."""
    torch.manual_seed(0)
    model = build("cifar_resnet20").double().eval()
    images, labels = torch.randn(7, 3, 32, 32, dtype=torch.float64), torch.randint(10, (7,))
    F.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
    theirs = gradients(model)
    model.zero_grad()
    run, parts = (
        make_run(colours, model),
        zip(images.split(sizes), labels.split(sizes), strict=True),
    )
    loss = sum(add_gradients(run, x, y, len(y) / 7) for x, y in parts)
    ours = gradients(model)
    assert len(ours) == len(theirs) == len(list(model.parameters()))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-10, atol=1e-12)
    expected = F.cross_entropy(model(images), labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected.detach())


def test_in_bf16_the_network_computes_in_bf16(colours: Path) -> None:
    model = build("cifar_resnet20")
    seen = []
    model.get_submodule("conv1").register_forward_hook(
        lambda _m, _a, output: seen.append(output.dtype)
    )
    run = make_run(colours, model)
    run.plan = replace(PLAN, request=replace(REQUEST, precision="bf16"))
    add_gradients(run, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), 1.0)
    assert seen == [torch.bfloat16]
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_a_clipped_gradient_moves_the_weights_by_at_most_its_norm(colours: Path) -> None:
    torch.manual_seed(0)
    model = build("cifar_resnet20", 3).train()
    run = make_run(colours, model)
    plain = ["train.momentum=0", "train.weight_decay=0"]
    for clip, expected in (("0.01", 0.01), ("1e6", None)):
        run.recipe = small(colours, *plain, f"train.clip={clip}")
        run.optimizer = make_optimizer(model, run.recipe.train)
        add_gradients(run, torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]), 1.0)
        norm = get_total_norm(gradients(model))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        take_step(run, 1.0)
        moved = [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)]
        assert float(get_total_norm(moved)) == pytest.approx(expected or float(norm), rel=1e-3)
        assert norm > 0.01


# Out of memory


ON_A_CPU = RuntimeError("[…] DefaultCPUAllocator: can't allocate memory: you tried to […]")
BY_CUDNN = RuntimeError("GET was unable to find an engine to execute this computation")


def exhaust_memory_after_third_step(patch: pytest.MonkeyPatch, error: Exception) -> None:
    """Let memory run out once the optimiser has changed weights for the third time."""
    steps, step = itertools.count(1), SGD.step

    def exhaust(optimizer: SGD) -> None:
        step(optimizer)
        if next(steps) == 3:
            raise error

    patch.setattr(SGD, "step", exhaust)


def exhaust_memory(
    monkeypatch: pytest.MonkeyPatch, *calls: int, error: Exception | None = None
) -> None:
    """Let these micro-batches, counted from 1, run out of memory after their forward pass."""
    count = itertools.count(1)

    def cross_entropy(*args: Any, **kwargs: Any) -> torch.Tensor:
        if next(count) in calls:
            raise error or torch.OutOfMemoryError
        return F.cross_entropy(*args, **kwargs)

    monkeypatch.setattr(work, "F", SimpleNamespace(cross_entropy=cross_entropy))


def read_plan(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return plan


@pytest.mark.parametrize(
    ("workers", "error"), [(0, None), (1, MemoryError()), (0, ON_A_CPU), (0, BY_CUDNN)]
)
def test_a_step_that_ran_out_of_memory_is_done_again_in_smaller_parts(
    colours: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
    error: Exception | None,
) -> None:
    """As if the run had been stopped before that step, and resumed with smaller parts."""
    others = active_children()  # of other tests
    recipe = small(colours, "train.micro_batch=auto", f"data.workers={workers}")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "other", listener=Signals(3))
    smaller = recipe.change(train={"micro_batch": 2})
    finetune(smaller, tmp_path / "other", resume=True)
    exhaust_memory(monkeypatch, 3, error=error)
    log = Log()
    finetune(recipe, tmp_path / "run", listener=log)
    assert_same_tensors(tmp_path / "run", tmp_path / "other")
    (told,) = [text for text in log.told if "ran out of memory" in text]
    assert "micro-batches of 5; epoch 1, step 3 is done again, with 2" in told
    assert log.shown[-1][1] == log.shown[-1][2]
    assert read_plan(tmp_path / "run")["micro_batch"] == 2
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert event == {"event": "out_of_memory", "epoch": 1, "step": 3, "micro_batch": 2}
    left = [child for child in active_children() if child not in others]
    assert not [child for child in left if child.daemon]  # no process reads any more


def test_with_frozen_batchnorm_smaller_parts_come_to_the_same(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(colours, "train.micro_batch=auto", "train.freeze_bn=true", "train.epochs=1")
    finetune(recipe, tmp_path / "whole")
    exhaust_memory(monkeypatch, 2)
    finetune(recipe, tmp_path / "halved")
    whole, halved = (
        load_file(tmp_path / name / "last.safetensors") for name in ("whole", "halved")
    )
    for key, value in whole.items():
        torch.testing.assert_close(halved[key], value, rtol=1e-3, atol=1e-5)
    fresh = build("cifar_resnet20").state_dict()
    kept = [key for key in whole if "running" in key]
    assert kept
    assert all(torch.equal(whole[key], fresh[key]) for key in kept)


def test_a_first_step_above_the_limit_counts_as_out_of_memory(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = itertools.chain([2**31], itertools.repeat(2**20))

    def measure(work: Any, _device: torch.device) -> int:
        work()
        return next(peaks)

    monkeypatch.setattr(memory, "measure", measure)
    recipe = small(colours, "train.micro_batch=auto", "train.memory=1GiB")
    finetune(recipe, tmp_path / "run")
    plan = read_plan(tmp_path / "run")
    assert (plan["sizes"], plan["limit_bytes"]) == ([3, 2], 2**30)
    assert 2**20 < plan["measured_bytes"] < 2**24
    monkeypatch.undo()
    finetune(small(colours), tmp_path / "two")
    assert_same_tensors(tmp_path / "run", tmp_path / "two")


def test_each_size_of_micro_batch_is_held_to_the_limit_once_in_each_epoch(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 18 images, an epoch has batches of 5 and of 3: the third measurement is in the second."""
    calls = itertools.count(1)

    def measure(work: Any, _device: torch.device) -> int:
        work()
        return 2**31 if next(calls) == 3 else 2**20

    monkeypatch.setattr(memory, "measure", measure)
    recipe = small(colours, "train.micro_batch=auto", "train.memory=1GiB", "train.epochs=2")
    finetune(recipe, tmp_path / "run")
    events = map(json.loads, (tmp_path / "run" / "events.jsonl").read_text().splitlines())
    (halving,) = (event for event in events if event["event"] == "out_of_memory")
    assert (halving["epoch"], halving["step"], halving["micro_batch"]) == (2, 1, 2)
    assert next(calls) == 6  # and parts of 3 and 2


def test_a_step_that_is_not_reproducible_is_done_again_once(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near the limit of a GPU cuDNN may take another algorithm the second time."""
    error = NotReproducible("something else", kind="inversion.not_reproducible")
    recipe = small(colours, "train.micro_batch=5", "train.batch_size=10", "train.epochs=1")
    exhaust_memory(monkeypatch, 2, error=error)
    log = Log()
    finetune(recipe, tmp_path / "run", listener=log)
    (told,) = [text for text in log.told if "not reproducible" in text]
    assert "was not reproducible with micro-batches of 5; epoch 1, step 1 is done again" in told
    assert read_plan(tmp_path / "run")["micro_batch"] == 2
    exhaust_memory(monkeypatch, 2, 3, error=error)
    with pytest.raises(NotReproducible) as raised:
        finetune(recipe, tmp_path / "other")
    assert raised.value is error
    exhaust_memory(monkeypatch, 1, error=error)
    with pytest.raises(NotReproducible):
        finetune(small(colours), tmp_path / "smallest")


def test_memory_that_runs_out_between_two_steps_leaves_a_run_to_resume(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count(1)

    def exhaust(folder: RunFolder, progress: Progress) -> None:
        if next(calls) == 1:
            raise MemoryError
        write_history(folder, progress)

    monkeypatch.setattr(saving, "write_history", exhaust)
    with pytest.raises(OutOfMemory, match="memory ran out\nMemoryError") as raised:
        finetune(small(colours), tmp_path / "run")
    assert (raised.value.fix or "").startswith(f"momconv finetune --resume {tmp_path / 'run'}")
    finetune(small(colours), tmp_path / "run", resume=True)
    monkeypatch.undo()
    finetune(small(colours), tmp_path / "straight")
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_without_the_memory_to_go_back_the_last_saved_state_is_kept(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    recipe = small(colours, "train.micro_batch=auto", "train.epochs=1", "train.save_every=1")
    with monkeypatch.context() as patch:
        exhaust_memory_after_third_step(patch, MemoryError())
        patch.setattr(saving, "load_newest", fail)
        with pytest.raises(OutOfMemory, match="memory ran out"):
            finetune(recipe, tmp_path / "run")
    finetune(recipe, tmp_path / "run", resume=True)
    finetune(recipe, tmp_path / "straight")
    assert_same(tmp_path / "run", tmp_path / "straight")


def test_a_run_that_halved_its_parts_can_be_interrupted_and_goes_on_with_them(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(colours, "train.micro_batch=auto", "train.memory=1GiB")
    for name, signals in (("straight", 0), ("stopped", 3)):
        exhaust_memory(monkeypatch, 2)
        with contextlib.suppress(Interrupted):
            finetune(recipe, tmp_path / name, listener=Signals(signals))
        monkeypatch.undo()
    assert not (tmp_path / "stopped" / "metrics.csv").read_text().splitlines()[1:]
    finetune(recipe, tmp_path / "stopped", resume=True)
    assert_same_tensors(tmp_path / "stopped", tmp_path / "straight")
    for name in ("straight", "stopped"):
        assert read_plan(tmp_path / name)["micro_batch"] == 2
        events = (tmp_path / name / "events.jsonl").read_text()
        assert events.count("out_of_memory") == 1


def test_a_run_that_is_killed_after_halving_goes_on_with_halves(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run = small(colours, "train.micro_batch=auto"), tmp_path / "run"
    copy = tmp_path / "copy"
    exhaust_memory(monkeypatch, 3)
    finetune(recipe, run, listener=Copies(run, copy, "ran out of memory"))
    monkeypatch.undo()
    finetune(recipe, copy, resume=True)
    assert_same(run, copy)
    assert (copy / "events.jsonl").read_text().count("out_of_memory") == 1


class WithIdlePart(nn.Module):
    """Has a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Conv2d(3, 2, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.used(x).flatten(1)
        return y


def test_measuring_gives_no_gradient_to_what_has_none(
    colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = WithIdlePart()
    run = make_run(colours, model)
    monkeypatch.setattr(memory, "write_plan", lambda run: None)
    memory.measure_gradients(run, torch.randn(2, 3, 8, 8), torch.tensor([0, 1]), 1.0)
    assert model.used.weight.grad is not None
    assert model.idle.weight.grad is None


def test_where_parts_cannot_be_smaller_the_state_is_saved(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exhaust_memory(monkeypatch, 4)
    with pytest.raises(ResourceError, match="micro-batches of 2, and there are") as failed:
        finetune(small(colours), tmp_path / "run")
    monkeypatch.undo()
    less = math.ceil(0.9 * read_plan(tmp_path / "run")["predicted_bytes"] / 2**20)
    assert (failed.value.fix or "").endswith(f"run --memory {less}MiB")
    finetune(small(colours), tmp_path / "run", resume=True)
    finetune(small(colours), tmp_path / "straight")
    assert_same_tensors(tmp_path / "run", tmp_path / "straight")


def test_a_step_of_the_optimiser_that_runs_out_of_memory_is_undone(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the weights are new then, so the run goes back to its last saved state."""
    exhaust_memory_after_third_step(monkeypatch, torch.OutOfMemoryError())
    recipe = small(colours, "train.micro_batch=auto", "train.epochs=1")
    finetune(recipe, tmp_path / "run")
    assert read_plan(tmp_path / "run")["micro_batch"] == 2
    monkeypatch.undo()
    finetune(small(colours, "train.epochs=1"), tmp_path / "two")
    assert_same_tensors(tmp_path / "run", tmp_path / "two")


def test_validation_that_runs_out_of_memory_is_done_again_with_fewer_images(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhaust(model: nn.Module, images: Any, *, batch_size: int, **options: Any) -> Any:
        if batch_size > fits:
            raise torch.OutOfMemoryError
        return evaluate(model, images, batch_size=batch_size, **options)

    monkeypatch.setattr(validation, "evaluate", exhaust)
    log, recipe, fits = Log(), small(colours, "train.epochs=1"), 1
    finetune(recipe, tmp_path / "run", listener=log)
    assert log.told[-1].endswith("while validating 2 images at once; it is done again, with 1")
    assert log.rows[0].val_top1 is not None
    fits = 0
    with pytest.raises(ResourceError, match="validating 1 image"):
        finetune(recipe, tmp_path / "other")
    monkeypatch.undo()
    finetune(recipe, tmp_path / "other", resume=True)
    assert_same_tensors(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adamw-8bit"])
@pytest.mark.parametrize("release", ["true", "false"])
def test_what_no_loss_depends_on_takes_what_is_planned(
    colours: Path, tmp_path: Path, optimizer: str, release: str
) -> None:
    changes = f"train.optimizer={optimizer}", f"train.release_gradients={release}"
    own = f'model.name="{deep.__file__}:make_with_spare"', "data.resolution=32"
    recipe = small(colours, *own, *changes, "train.epochs=1", "train.micro_batch=auto")
    plan = finetune(recipe, tmp_path).plan
    held, peak = plan.measured_static_bytes, plan.peak
    assert held
    assert peak
    assert held.weights - held.gradients > 4 * 100 * 100
    assert (held.gradients, held.weights) == (peak.gradients, peak.weights)
    assert held.optimizer == pytest.approx(peak.optimizer, rel=0.05)  # counts of steps
    assert plan.measured_bytes == pytest.approx(plan.predicted_bytes, rel=0.02)


def test_the_plan_s_prediction_is_what_the_first_step_takes(colours: Path, tmp_path: Path) -> None:
    for strategy in ("store", "checkpoint", "momentum"):
        recipe = small(colours, f"momentum.strategy={strategy}", "train.epochs=1")
        finetune(recipe, tmp_path / strategy)
        plan = read_plan(tmp_path / strategy)
        assert plan["predicted_bytes"] == pytest.approx(plan["measured_bytes"], rel=0.02)
        assert plan["predicted_seconds"] > 0
        assert plan["measured_seconds"] > 0


def test_a_step_whose_activations_outgrow_a_range_is_done_again(
    colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small(colours, "train.epochs=1", "momentum.strategy=momentum", "train.ema=0.5")
    finetune(recipe, tmp_path / "found")
    monkeypatch.setattr(sequential, "find_range", lambda *_: (-9, True))

    finetune(recipe, tmp_path / "widened")

    (found,), (widened,) = (read_metrics(tmp_path / name) for name in ("found", "widened"))
    assert float(widened["train_loss"]) == pytest.approx(float(found["train_loss"]), rel=1e-4)
    for name in ("last", "best"):
        stages = momentum_stages(load(tmp_path / "widened" / f"{name}.safetensors"))
        assert all((run.exponent or 0) > 0 for stage in stages.values() for run in stage.runs or ())

"""Gradients that are used and freed in the backward pass."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Log, Signals, assert_same, assert_same_tensors, resume, small
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import momconv
from momconv.eightbit import AdamW8bit, SGD8bit
from momconv.errors import MomconvError, NotReproducible, OutOfMemory, UsageError
from momconv.planner.measurement import measure, run_step, static_bytes
from momconv.planner.prediction import peak_memory
from momconv.recipe import load_recipe
from momconv.training import releasing
from momconv.training.finetuning import finetune
from momconv.training.gradients import add_gradients
from momconv.training.interruption import Interrupted
from momconv.zoo.networks import build

CPU = torch.device("cpu")
RELEASED = ["train.micro_batch=auto", "train.release_gradients=true"]
IMAGES, LABELS = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])


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


# The interface


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
    assert len(optimizer.param_groups) == 2


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


def _momentum(optimizer: str) -> dict[str, Any]:
    return {"momentum": 0.9, "fused": True} if optimizer == "sgd" else {}


# Runs


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
    change, calls = releasing._change, 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 160:  # in the middle of the third step
            raise kind("it failed", kind="test")
        change(*args)

    monkeypatch.setattr(releasing, "_change", fail)
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
        return add_gradients(run, images * torch.inf if calls == 3 else images, labels, share, seek)

    monkeypatch.setattr("momconv.training.loop.add_gradients", spoil)
    log = Log()
    finetune(small(colours, *RELEASED, "train.lr=0.01"), tmp_path / "run", listener=log)
    assert any("going back to epoch 1, step 0" in told for told in log.told)
    assert_same_tensors(tmp_path / "run", tmp_path / "other")


@pytest.mark.parametrize("other", ["train.clip=1", "train.micro_batch=2", "train.precision=fp16"])
def test_what_needs_all_gradients_keeps_them(other: str, colours: Path) -> None:
    with pytest.raises(UsageError, match="needs the whole batch at once"):
        load_recipe(None, [*RELEASED, other])
    assert not load_recipe(None, [other]).train.can_release_gradients

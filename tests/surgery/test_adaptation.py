import copy
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from momconv.errors import ThresholdNotMet
from momconv.surgery.adaptation import LADDER, Adaptation, Choice, Distillation, find_gamma
from momconv.surgery.calibration import calibrate
from momconv.surgery.conversion import convert, revert
from momconv.surgery.drift import Drift, Reference
from momconv.zoo.networks import build


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("momconv.surgery.calibration._STEPS", 3)


def batches(seed: int = 0, count: int = 20) -> list[Tensor]:
    return [torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))]


@pytest.fixture(scope="module")
def original() -> nn.Module:
    torch.manual_seed(0)
    network = build("cifar_resnet20")
    calibrate(network, batches())
    return network


def names(adaptation: Adaptation) -> list[str]:
    return [step.name for step in adaptation.steps]


def test_every_step_is_measured(original: nn.Module) -> None:
    adaptation = Adaptation(convert(original, stages="all"), Reference(original, batches(1)))
    adaptation.calibrate(batches(count=100), 100)
    adaptation.distill(batches(), Distillation(epochs=1))
    assert names(adaptation) == ["swapped", "statistics", "refined", "distilled"]
    assert len({step.drift.distance for step in adaptation.steps}) >= 3
    assert adaptation.drift == Reference(original, batches(1)).compare(adaptation.model)
    assert adaptation.layers in (0, 19)  # new statistics only where they are better
    assert not adaptation.interrupted


def test_statistics_alone_need_no_training(original: nn.Module) -> None:
    adaptation = Adaptation(convert(original, 0), Reference(original, batches(1)))
    before = copy.deepcopy(dict(adaptation.model.named_parameters()))
    adaptation.calibrate(batches(), 20, refine=False)
    assert names(adaptation) == ["swapped", "statistics"]
    after = adaptation.model.named_parameters()
    assert all(torch.equal(value, before[key]) for key, value in after)


def test_a_plain_network_is_brought_close_to_a_momentum_network(original: nn.Module) -> None:
    model = convert(original, 0.5, stages="all")
    adaptation = Adaptation(revert(model), Reference(model, batches(1)))
    adaptation.calibrate(batches(), 20)
    adaptation.distill(batches(), Distillation(epochs=2))
    assert adaptation.steps[-1].drift.divergence < adaptation.steps[0].drift.divergence


def test_progress_tells_images_and_steps(original: nn.Module) -> None:
    told = list[tuple[str, int, int]]()
    adaptation = Adaptation(
        convert(original), Reference(original, batches(1)), lambda *args: told.append(args)
    )
    adaptation.calibrate(batches(), 20)
    adaptation.distill(batches(), Distillation(epochs=2))
    adaptation.distill(batches(), Distillation(minutes=1e-9))
    assert told[0] == ("statistics", 20, 20)
    assert ("refining", 5, 5) in told
    assert ("distilling", 2, 2) in told
    assert told[-1][0] == "distilling (seconds)"


def test_an_interruption_keeps_the_best_and_ends_the_work(original: nn.Module) -> None:
    def interrupt(what: str, done: int, _total: int) -> None:
        if (what, done) == ("refining", 2):
            raise KeyboardInterrupt

    adaptation = Adaptation(convert(original), Reference(original, batches(1)), interrupt)
    adaptation.calibrate(batches(), 20)
    assert adaptation.interrupted
    adaptation.distill(batches(), Distillation(epochs=1))
    assert names(adaptation) == ["swapped", "statistics", "refined"]


# The search for γ


def search(limit: float, share: float = 0.01, interrupted_at: float | None = None) -> Choice:
    """Where at most ``limit`` is a γ good enough."""

    def attempt(gamma: float) -> Adaptation:
        drift = Drift(100, 1 if gamma <= limit else 7, 0, 0)
        fake = SimpleNamespace(drift=drift, gamma=gamma, interrupted=gamma == interrupted_at)
        return cast(Adaptation, fake)

    return find_gamma(attempt, share)


@pytest.mark.parametrize("gamma", LADDER)
def test_the_largest_that_is_good_enough_is_found_in_three_attempts(gamma: float) -> None:
    choice = search(gamma)
    assert choice.gamma == gamma == vars(choice.adaptation)["gamma"]
    assert len(choice.tried) <= 3
    assert gamma in {attempt.gamma for attempt in choice.tried}


def test_if_none_is_the_figures_are_told() -> None:
    with pytest.raises(ThresholdNotMet) as caught:
        search(0)
    assert "γ 0.7: 7.0%, γ 0.3: 7.0%, γ 0.1: 7.0%" in caught.value.message
    assert caught.value.fix is not None
    assert "--max-drift 7.1%" in caught.value.fix
    assert search(0, share=0.071).gamma == 0.95


def test_an_interruption_ends_the_search_with_the_best() -> None:
    assert search(0.8, interrupted_at=0.9).gamma == 0.7
    assert search(0.8, interrupted_at=0.7).gamma == 0.7
    with pytest.raises(KeyboardInterrupt):
        search(0.5, interrupted_at=0.7)

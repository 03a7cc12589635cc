from types import SimpleNamespace
from typing import cast

import pytest

from momconv.errors import ThresholdNotMet
from momconv.surgery.adaptation import Adaptation
from momconv.surgery.drift import Drift
from momconv.surgery.ladder import LADDER, Choice, find_gamma


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

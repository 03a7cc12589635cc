"""Whether a run has stopped getting better."""

import math
from collections.abc import Sequence

from momconv.recipe import TrainRecipe
from momconv.training.progress import EpochRow


def has_stalled(history: Sequence[EpochRow], recipe: TrainRecipe) -> bool:
    """Whether the last ``patience`` epochs brought nothing better than the best by ``min_delta``.

    While γ changes nothing counts: earlier epochs scored another network.
    """
    if recipe.patience is None:
        return False
    best, waited = -math.inf, 0
    for row in (row for row in history if row.gamma == history[-1].gamma):
        if (figure := row.judge(recipe.monitor)) > best + recipe.min_delta:
            best, waited = figure, 0
        else:
            waited += 1
    return waited >= recipe.patience

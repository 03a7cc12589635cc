"""Whether a run has stopped getting better, and whether anything could say so."""

import math
from collections.abc import Sequence

from momconv.data.folder import Splits
from momconv.errors import UsageError
from momconv.recipe import Recipe, TrainRecipe
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


def require_validation(recipe: Recipe, splits: Splits) -> None:
    """Do nothing unless patience would wait for scores that there are not.

    Raises:
        UsageError: It would.
    """
    if recipe.train.patience is not None and not splits.val.samples:
        raise UsageError(
            "train.patience: without held-out images nothing says when to stop",
            kind="usage.no_validation",
            fix="--val-frac 0.2\n--set train.patience=null",
        )

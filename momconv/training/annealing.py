"""γ over a run: it may start small, where the network is still close to the plain one."""

from torch import nn

from momconv.recipe import ANNEAL_FROM, MomentumRecipe
from momconv.surgery.conversion import set_gamma


def gamma_at(recipe: MomentumRecipe, epochs: float) -> float:
    """γ of the step before which so many epochs are done: in a straight line to its target.

    >>> recipe = MomentumRecipe(gamma=0.9, anneal=2)
    >>> [round(gamma_at(recipe, epochs), 2) for epochs in (0, 0.5, 1, 2, 3)]
    [0.1, 0.3, 0.5, 0.9, 0.9]
    """
    if epochs >= recipe.anneal:
        return recipe.gamma
    return ANNEAL_FROM + (recipe.gamma - ANNEAL_FROM) * epochs / recipe.anneal


def anneal(model: nn.Module, recipe: MomentumRecipe, epochs: float) -> None:
    """Give ``model`` the γ of its next step. Without annealing it keeps its own."""
    if recipe.anneal:
        set_gamma(model, gamma_at(recipe, epochs), gain=recipe.gain)

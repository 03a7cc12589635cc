"""The parameters of a network by stage: which are frozen, and how fast and how freely each learns.

Stages are named as in ``momconv.planner.measurement.find_stages``: "stem", the stages by their own
names (such as "layer3"), and "head".
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from momconv.errors import UsageError
from momconv.planner.measurement import find_stages
from momconv.recipe import TrainRecipe


def name_stages(model: nn.Module) -> list[str]:
    """The stages of ``model``, from the image to the logits."""
    return list(dict.fromkeys(find_stages(model).values()))


def require_stages(model: nn.Module, wanted: Sequence[str]) -> None:
    """Do nothing if ``model`` has the stages ``wanted``, and others to train.

    Raises:
        UsageError: It has not.
    """
    known = name_stages(model)
    some = f"train.freeze with some of {', '.join(known)}"
    if unknown := [name for name in wanted if name not in known]:
        problem = f"train.freeze: this {type(model).__name__} has no stage {unknown[0]!r}"
        raise UsageError(problem, kind="usage.unknown_stage", fix=some)
    if set(wanted) == set(known):
        problem = "train.freeze: all stages are frozen, which leaves nothing to train"
        raise UsageError(problem, kind="usage.all_frozen", fix=f"{some}, but not all")


def freeze(model: nn.Module, wanted: Sequence[str]) -> None:
    """Let the stages ``wanted`` compute what they compute now, BatchNorm's statistics included."""
    for module, name in find_stages(model).items():
        if name in wanted:
            module.eval().requires_grad_(requires_grad=False)


def group(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """The trainable parameters as an optimiser's groups; ``scale`` is the factor of their rate.

    A stage k steps below the head has the factor ``layer_decay``ᵏ (Clark et al. 2020, ELECTRA).
    Normalisation layers do not decay, as in torchvision's recipes of 2021
    (``--norm-weight-decay 0``), nor do biases, of which torchvision leaves the choice.
    """
    scales = _scale_stages(model, recipe)
    children = dict(model.named_children())
    stages = find_stages(model)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (parameter.dim() > 1) is decays:
                child = children.get(name.partition(".")[0])
                stage = stages.get(child, "stem") if child is not None else "stem"
                key = (scales.get(stage, 1.0), recipe.weight_decay if decays else 0.0)
                groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def _scale_stages(model: nn.Module, recipe: TrainRecipe) -> dict[str, float]:
    *body, head = name_stages(model)
    scales = {name: recipe.layer_decay**k for k, name in enumerate(reversed(body), start=1)}
    return scales | {head: (recipe.head_lr or recipe.resolved_lr) / recipe.resolved_lr}

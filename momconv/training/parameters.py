"""The parameters of a network by stage: how fast and how freely each learns."""

from typing import Any

from torch import nn

from momconv.errors import UsageError
from momconv.recipe import TrainRecipe
from momconv.words import quoted
from momconv.zoo.stages import ALL_BUT_HEAD, assign_parameters, find_stages, name_stages


def require_stages(model: nn.Module, recipe: TrainRecipe) -> None:
    """Do nothing if ``model`` has the stages that the recipe freezes, and others to train.

    Raises:
        UsageError: It has not.
    """
    known = list(find_stages(model))
    wanted = name_stages(known, recipe.freeze)
    some = f"its stages: {', '.join(known)}"
    if unknown := sorted(wanted.difference(known)):
        problem = (
            f"train.freeze: this {type(model).__name__} has no stage {quoted(unknown[0])}\n{some}"
        )
        raise UsageError(problem, kind="usage.unknown_stage", fix=f"--freeze {known[0]}")
    if wanted == set(known):
        problem = "train.freeze: all stages are frozen, which leaves nothing to train"
        raise UsageError(problem, kind="usage.all_frozen", fix=f"--freeze {ALL_BUT_HEAD}")
    if recipe.freeze_epochs and "head" in wanted:
        problem = "train.freeze_epochs: only the head learns in them, and train.freeze has it too"
        raise UsageError(problem, kind="usage.all_frozen", fix="--freeze-epochs 0")


def describe_frozen(model: nn.Module) -> str | None:
    """What to tell of the share of the parameters that learn; None if all do."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == total:
        return None
    return f"note: {trained:,} of {total:,} parameters learn ({trained / total:.1%})"


def group(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """The trainable parameters as an optimiser's groups; ``scale`` is the factor of their rate.

    A stage k steps below the head has the factor ``layer_decay``ᵏ (Clark et al. 2020, ELECTRA).
    Normalisation layers do not decay, as in torchvision's recipes of 2021
    (``--norm-weight-decay 0``), nor do biases, of which torchvision leaves the choice.
    """
    scales = _scale_stages(model, recipe)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for parameter, stage in assign_parameters(model).items():
            if parameter.requires_grad and (parameter.dim() > 1) is decays:
                key = (scales[stage], recipe.weight_decay if decays else 0.0)
                groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in groups.items()
    ]


def _scale_stages(model: nn.Module, recipe: TrainRecipe) -> dict[str, float]:
    *body, head = find_stages(model)
    scales = {name: recipe.layer_decay**k for k, name in enumerate(reversed(body), start=1)}
    return scales | {head: (recipe.head_lr or recipe.resolved_lr) / recipe.resolved_lr}

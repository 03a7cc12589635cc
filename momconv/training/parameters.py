"""The parameters of a network by stage: which are frozen, and how fast and how freely each learns.

"stem" is what comes before the stages and "head" what comes after them; a stage has the name of
its module, such as "layer3" in a ResNet, "features.2" in a ConvNeXt or
"encoder.layers.encoder_layer_0" in a vision transformer, where each block is one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from momconv.errors import UsageError
from momconv.recipe import TrainRecipe

ALL_BUT_HEAD = "all-but-head"  # in place of the names of those stages
_TRUNK = 0.9  # of the parameters: a module with more has the stages inside


def find_stages(model: nn.Module) -> dict[str, list[str]]:
    """The names of the modules of each stage, from the image to the logits."""
    head = [name for name, child in model.named_children() if _count(child)][-1]
    stages: dict[str, list[str]] = {"stem": []}
    after: list[str] = []
    module, path = model, ""
    while True:
        kids = {
            f"{path}{name}": child
            for name, child in module.named_children()
            if _count(child) and f"{path}{name}" != head
        }
        names, total = list(kids), sum(map(_count, kids.values()))
        trunks = [name for name in names if _count(kids[name]) > _TRUNK * total]
        inside = trunks or [n for n in names if isinstance(kids[n], nn.Sequential | nn.ModuleList)]
        first, last = (names.index((inside or names)[end]) for end in (0, -1))
        stages["stem"] += names[:first]
        after = [*names[last + 1 :], *after]
        if not trunks or not any(map(_count, kids[trunks[0]].children())):
            break
        module, path = kids[trunks[0]], f"{trunks[0]}."
    stages |= {name: [name] for name in names[first : last + 1]}
    stages["head"] = [*after, head]
    return {stage: modules for stage, modules in stages.items() if modules}


def require_stages(model: nn.Module, recipe: TrainRecipe) -> None:
    """Do nothing if ``model`` has the stages that the recipe freezes, and others to train.

    Raises:
        UsageError: It has not.
    """
    known = list(find_stages(model))
    wanted = _name_stages(known, recipe.freeze)
    some = f"its stages: {', '.join(known)}"
    if unknown := sorted(wanted.difference(known)):
        problem = f"train.freeze: this {type(model).__name__} has no stage {unknown[0]!r}\n{some}"
        raise UsageError(problem, kind="usage.unknown_stage", fix=f"--freeze {known[0]}")
    if wanted == set(known):
        problem = "train.freeze: all stages are frozen, which leaves nothing to train"
        raise UsageError(problem, kind="usage.all_frozen", fix=f"--freeze {ALL_BUT_HEAD}")
    if recipe.freeze_epochs and "head" in wanted:
        problem = "train.freeze_epochs: only the head learns in them, and train.freeze has it too"
        raise UsageError(problem, kind="usage.all_frozen", fix="--freeze-epochs 0")


def freeze(model: nn.Module, wanted: Sequence[str]) -> None:
    """Let the stages ``wanted`` compute what they compute now, BatchNorm's statistics included."""
    stages = find_stages(model)
    frozen = _name_stages(stages, wanted)
    for name in frozen:
        for module in stages[name]:
            model.get_submodule(module).eval()
    for parameter, stage in _assign(model).items():
        if stage in frozen:
            parameter.requires_grad = False


def describe_frozen(model: nn.Module) -> str | None:
    """What to tell of the share of the parameters that learn; None if all do."""
    total = _count(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == total:
        return None
    return f"note: {trained:,} of {total:,} parameters learn ({trained / total:.1%})"


def _name_stages(known: Iterable[str], wanted: Sequence[str]) -> set[str]:
    """The stages ``wanted``, of which most may be named by one word."""
    body = set(known) - {"head"} if ALL_BUT_HEAD in wanted else set()
    return body | (set(wanted) - {ALL_BUT_HEAD})


def group(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """The trainable parameters as an optimiser's groups; ``scale`` is the factor of their rate.

    A stage k steps below the head has the factor ``layer_decay``ᵏ (Clark et al. 2020, ELECTRA).
    Normalisation layers do not decay, as in torchvision's recipes of 2021
    (``--norm-weight-decay 0``), nor do biases, of which torchvision leaves the choice.
    """
    scales = _scale_stages(model, recipe)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for decays in (True, False):
        for parameter, stage in _assign(model).items():
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


def _assign(model: nn.Module) -> dict[nn.Parameter, str]:
    """The stage of each parameter; those outside all modules, a class token, say: the first."""
    stages = find_stages(model)
    modules = {name: stage for stage, names in stages.items() for name in names}
    found: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
        found[parameter] = next((modules[p] for p in prefixes if p in modules), next(iter(stages)))
    return found


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

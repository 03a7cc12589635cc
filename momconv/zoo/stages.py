"""The stages of a network, and keeping some of them as they are.

"stem" is what comes before the stages and "head" what comes after them; a stage has the name of
its module, such as "layer3" in a ResNet, "features.2" in a ConvNeXt or
"encoder.layers.encoder_layer_0" in a vision transformer, where each block is one.
"""

from collections.abc import Iterable, Sequence

from torch import nn

ALL_BUT_HEAD = "all-but-head"  # in place of the names of those stages
_TRUNK = 0.9  # of the parameters: a module with more has the stages inside


def find_stages(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of the modules of each stage, from the image to the logits."""
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


def assign_parameters(model: nn.Module) -> dict[nn.Parameter, str]:
    """Return the stage of each parameter: the first for those outside of all modules."""
    stages = find_stages(model)
    modules = {name: stage for stage, names in stages.items() for name in names}
    found: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts)))
        found[parameter] = next((modules[p] for p in prefixes if p in modules), next(iter(stages)))
    return found


def freeze(model: nn.Module, wanted: Sequence[str]) -> None:
    """Let the stages ``wanted`` compute what they compute now, BatchNorm's statistics included."""
    stages = find_stages(model)
    frozen = name_stages(stages, wanted)
    for name in frozen:
        for module in stages[name]:
            model.get_submodule(module).eval()
    for parameter, stage in assign_parameters(model).items():
        if stage in frozen:
            parameter.requires_grad = False


def name_stages(known: Iterable[str], wanted: Sequence[str]) -> set[str]:
    """Return the stages ``wanted``, of which most may be named by one word."""
    body = set(known) - {"head"} if ALL_BUT_HEAD in wanted else set()
    return body | (set(wanted) - {ALL_BUT_HEAD})


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""Which blocks of a network the methods treat: the same for every method."""

from torch import nn

from momconv import convert
from momconv.momentum.sequential import Run, momentum_stages


def stage_names(model: nn.Module) -> list[str]:
    """The stages that have a run of residual blocks of one shape."""
    return list(find_runs(model))


def find_runs(model: nn.Module) -> dict[str, tuple[Run, ...]]:
    """The runs of residual blocks of one shape, by stage, as momconv finds them."""
    converted = convert(model, stages="all")
    return {name: stage.runs or () for name, stage in momentum_stages(converted).items()}

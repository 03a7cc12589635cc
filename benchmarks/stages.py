"""Which blocks of a network the methods treat: the same for every method."""

from torch import nn

from momconv import convert
from momconv.momentum.sequential import Run, momentum_stages


def find_runs(model: nn.Module) -> dict[str, tuple[Run, ...]]:
    """The runs of residual blocks of one shape, by stage, as momconv finds them.

    What is around stages is there too, and has no runs.
    """
    converted = convert(model, stages="all")
    return {name: stage.runs or () for name, stage in momentum_stages(converted).items()}

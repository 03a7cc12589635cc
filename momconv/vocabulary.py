"""The words that recipes, options, networks, plans and reports share, and what is known of each.

An optimiser or a strategy is its name and its row here, besides the code that carries it out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Precision = Literal["fp32", "bf16", "fp16"]
MomentumUse = Literal["auto", "always", "never"]  # auto: where it pays
Velocity = Literal["zero", "residual"]  # v[0]: 0, or f(x[0])
Monitor = Literal["val/top1", "val/macro_f1", "val/loss"]  # says which epoch is best
Strategy = Literal["store", "checkpoint", "segment", "momentum"]
StrategyChoice = Literal["auto", Strategy]
Strategies = StrategyChoice | dict[str, str]  # one for all stages, or each stage's by its name
Interpolation = Literal[
    "nearest", "nearest-exact", "bilinear", "bicubic", "box", "hamming", "lanczos"
]
OptimizerName = Literal["sgd", "adamw", "sgd-8bit", "adamw-8bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyRow:
    """What is known of a strategy before it runs."""

    explanation: str  # where backward gets the activations of a converted network
    depends_on_gamma: bool  # its memory does: it keeps side information
    turn: int | None  # at which the planner tries it for all stages; None: if it is asked for


STRATEGIES: Mapping[StrategyChoice, StrategyRow] = {
    "store": StrategyRow(
        explanation="converted, all activations stored", depends_on_gamma=False, turn=0
    ),
    "checkpoint": StrategyRow(
        explanation="converted, each block recomputed from its stored input",
        depends_on_gamma=False,
        turn=1,
    ),
    "segment": StrategyRow(
        explanation="converted, each stage recomputed from its input, then block by block",
        depends_on_gamma=False,
        turn=3,
    ),
    "momentum": StrategyRow(
        explanation="converted, inputs reconstructed backwards, each block recomputed",
        depends_on_gamma=True,
        turn=None,
    ),
    "auto": StrategyRow(
        explanation="momentum in long runs of blocks, checkpointing elsewhere",
        depends_on_gamma=True,
        turn=2,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerRow:
    """What is known of an optimiser before it runs.

    Attributes:
        class_name: Of its class in torch.optim or, of 8 bits, momconv.eightbit, and in reports.
        states: Tensors that it keeps for each trainable parameter, of its shape.
        bits: Of each of their values.
        rates: The range in which a learning rate is looked for.
        default_rate: The highest rate for a batch of so many images.
        arguments: What it is made with besides rate and weight decay, given the recipe's momentum.
    """

    class_name: str
    states: int
    bits: Literal[8, 32] = 32
    rates: tuple[float, float]
    default_rate: Callable[[int], float]
    arguments: Callable[[float], Mapping[str, object]]


_SGD = OptimizerRow(
    class_name="SGD",
    states=1,
    rates=(1e-5, 1.0),
    default_rate=lambda batch_size: 0.01 * batch_size / 32,
    arguments=lambda momentum: {"momentum": momentum, "nesterov": momentum > 0},
)
_ADAMW = OptimizerRow(
    class_name="AdamW",
    states=2,
    rates=(1e-7, 1e-1),
    default_rate=lambda _: 1e-4,
    arguments=lambda _: {},
)
OPTIMIZERS: Mapping[OptimizerName, OptimizerRow] = {
    "sgd": _SGD,
    "adamw": _ADAMW,
    "sgd-8bit": replace(_SGD, class_name="SGD8bit", bits=8),
    "adamw-8bit": replace(_ADAMW, class_name="AdamW8bit", bits=8),
}

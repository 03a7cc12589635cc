"""The optimiser, its learning rate over the run, and the precision."""

import math

import torch
from torch import nn, optim
from torch.optim import Optimizer

from momconv.errors import UsageError
from momconv.recipe import TrainRecipe
from momconv.training.parameters import group
from momconv.vocabulary import OPTIMIZERS, Precision

_CYCLE_START = 1 / 25  # of the highest rate


def make_optimizer(model: nn.Module, recipe: TrainRecipe) -> Optimizer:
    """The recipe's, with the rate and the weight decay of each group of parameters."""
    groups, row = group(model, recipe), OPTIMIZERS[recipe.optimizer]
    # The fused kernels need no temporary copy of all gradients, which nobody has planned for.
    arguments = {"fused": groups[0]["params"][0].is_cuda, **row.arguments(recipe.momentum)}
    optimizer: Optimizer = getattr(optim, row.class_name)(groups, recipe.resolved_lr, **arguments)
    return optimizer


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Let the next step have the learning rate ``lr``, times the factor of each group."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr * parameters["scale"]


def rate_at(recipe: TrainRecipe, step: int, steps_per_epoch: int) -> float:
    """The learning rate of the run's step ``step``, from 0.

    A pure function rather than a scheduler with a state: a run that goes on for more epochs than
    first planned follows the longer schedule from where it is.
    """
    total = recipe.epochs * steps_per_epoch
    if recipe.schedule == "onecycle":
        return recipe.resolved_lr * share_of_cycle(step, total=total)
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), total // 2)
    if recipe.schedule == "constant" and step >= warmup:
        return recipe.resolved_lr
    return recipe.resolved_lr * share_of_rate(step, warmup=warmup, total=total)


def share_of_rate(step: int, *, warmup: int, total: int) -> float:
    """The factor of the learning rate at ``step``: a linear warm-up, then half a cosine to 0.

    >>> [round(share_of_rate(step, warmup=2, total=6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def share_of_cycle(step: int, *, total: int) -> float:
    """The factor of the learning rate at ``step`` of one cycle (Smith and Topin 2017).

    As PyTorch's ``OneCycleLR`` by default: from 1/25 up by half a cosine in 30 % of the steps, then
    down by another to a ten-thousandth of where it began. The optimiser's momentum stays.

    >>> [round(share_of_cycle(step, total=11), 2) for step in range(0, 11, 2)]
    [0.04, 0.96, 0.88, 0.53, 0.16, 0.0]
    """
    peak = 0.3 * total - 1
    if step <= peak:
        return _move(_CYCLE_START, 1, step / peak)
    return _move(1, _CYCLE_START / 1e4, (step - peak) / (total - 1 - peak))


def _move(start: float, end: float, share: float) -> float:
    """Where half a cosine from ``start`` to ``end`` is after this share of its length."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def choose_precision(recipe: TrainRecipe, device: torch.device) -> Precision:
    """The recipe's precision; "auto" is bf16 on GPUs that compute in it, and fp32 elsewhere.

    Raises:
        UsageError: It is fp16, and the device is no GPU.
    """
    if recipe.precision == "fp16" and device.type != "cuda":
        raise UsageError(
            f"train.precision: fp16 is for GPUs, and the device is {device}",
            kind="usage.no_fp16",
            fix="--precision bf16\n--precision fp32",
        )
    if recipe.precision != "auto":
        return recipe.precision
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if fast else "fp32"

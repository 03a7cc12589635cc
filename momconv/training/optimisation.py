"""The optimiser and what belongs to it: parameter groups, learning rate, precision, average."""

import itertools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from momconv import eightbit
from momconv.errors import UsageError
from momconv.momentum.sequential import read_ranges, set_ranges
from momconv.recipe import TrainRecipe
from momconv.training.sharding import divide_like, is_sharded, own_parts
from momconv.vocabulary import OPTIMIZERS, Precision
from momconv.words import quoted
from momconv.zoo.stages import ALL_BUT_HEAD, assign_parameters, find_stages, name_stages

_CYCLE_START = 1 / 25  # of the highest rate
_SCALER_STATE = ("scale", "_growth_tracker")


def make_optimizer(model: nn.Module, recipe: TrainRecipe) -> Optimizer:
    """Return the recipe's optimiser, with the rate and the weight decay of each group."""
    groups, row = _group_parameters(model, recipe), OPTIMIZERS[recipe.optimizer]
    arguments = row.arguments(recipe.momentum)
    if row.bits == 8:
        make = getattr(eightbit, row.class_name)
    else:  # the fused kernels need no temporary copies, which nobody has planned for
        # There is none for SGD of what is divided.
        make = partial(getattr(optim, row.class_name), fused=not is_sharded(model))
    optimizer: Optimizer = make(groups, recipe.resolved_lr, **arguments)
    if isinstance(optimizer, optim.SGD) and recipe.momentum:
        optimizer.register_step_pre_hook(_begin_buffers)
    return optimizer


def _begin_buffers(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
    """Begin those of new gradients, as fused SGD cannot after those of other parameters."""
    for parameter in itertools.chain(*(group["params"] for group in optimizer.param_groups)):
        if parameter.grad is not None and parameter not in optimizer.state:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Let the next step have the learning rate ``lr``, times the factor of each group."""
    for parameters in optimizer.param_groups:
        parameters["lr"] = lr * parameters["scale"]


def rate_at(recipe: TrainRecipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of the run's step ``step``, from 0.

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
    """Return the factor of the rate at ``step``: a linear warm-up, then half a cosine to 0.

    >>> [round(share_of_rate(step, warmup=2, total=6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


def share_of_cycle(step: int, *, total: int) -> float:
    """Return the factor of the learning rate at ``step`` of one cycle (Smith and Topin 2017).

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
    """Return where half a cosine from ``start`` to ``end`` is after this share of its length."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def choose_precision(recipe: TrainRecipe, device: torch.device) -> Precision:
    """Return the recipe's precision; "auto" is bf16 on GPUs that compute in it, and fp32 elsewhere.

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
    """Return what to tell of the share of the parameters that learn; None if all do."""
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained == total:
        return None
    return f"note: {trained:,} of {total:,} parameters learn ({trained / total:.1%})"


def _group_parameters(model: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Return the trainable parameters as an optimiser's groups, with the ``scale`` of their rate.

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


def make_scaler(precision: Precision, device: torch.device) -> GradScaler:
    """Return a factor of the loss that keeps small gradients within the range of fp16, and adapts.

    In other precisions, one that does nothing.
    """
    return GradScaler(device.type, enabled=precision == "fp16")


def read_scaler(scaler: GradScaler) -> dict[str, Tensor]:
    """Return the state of ``scaler``; nothing if it is disabled."""
    state = scaler.state_dict()
    return {name: torch.tensor(state[name], dtype=torch.float64) for name in _SCALER_STATE if state}


def restore_scaler(scaler: GradScaler, tensors: Mapping[str, Tensor]) -> None:
    """Restore what ``read_scaler`` returned."""
    if scaler.is_enabled() and tensors:
        scale, tracker = (tensors[name] for name in _SCALER_STATE)
        own = {"scale": float(scale), "_growth_tracker": int(tracker)}
        scaler.load_state_dict(scaler.state_dict() | own)


class Average:
    """The exponential moving average of a network's weights and of BatchNorm's statistics.

    Its runs have the ranges of the network's own.

    Early on it forgets faster, with a decay of (1 + n) / (10 + n) after n steps as in TensorFlow's
    ``ExponentialMovingAverage``; otherwise short runs would end close to where they began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._averaged = AveragedModel(model, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The network with the averages; it is not for training."""
        model: nn.Module = self._averaged.module
        return model

    def update(self, model: nn.Module) -> None:
        """Count in ``model`` as it is after a step."""
        n = int(self._averaged.n_averaged)
        decay = min(self._decay, (1 + n) / (10 + n))
        average = get_ema_multi_avg_fn(decay)
        self._averaged.multi_avg_fn = lambda ours, theirs, n: average(
            own_parts(ours), own_parts(theirs), n
        )
        self._averaged.update_parameters(model)
        set_ranges(self.model, read_ranges(model))

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the average."""
        return dict(self._averaged.state_dict())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what ``tensors`` returned."""
        own = self._averaged.state_dict()
        self._averaged.load_state_dict({k: divide_like(v, own[k]) for k, v in tensors.items()})

"""How a run fits its memory: planned by prediction, and checked against its first step."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TypeVar

import torch
from torch import nn

from momconv.determinism import describe_tf32
from momconv.errors import ResourceError
from momconv.momentum.sequential import momentum_stages
from momconv.planner.choice import NetworkChoice, choose
from momconv.planner.cost import estimate_speed
from momconv.planner.outlook import FEW, has_batch_norm
from momconv.planner.plan import Alternative, Plan, Request
from momconv.planner.prediction import Predictor
from momconv.planner.search import search
from momconv.planner.speed import measure_speed
from momconv.recipe import MomentumRecipe, TrainRecipe
from momconv.training import network
from momconv.training.processes import Processes
from momconv.training.progress import Listener
from momconv.units import format_bytes, format_duration
from momconv.words import align
from momconv.zoo.networks import outline

T = TypeVar("T")
_LONG = 2 * 3600  # seconds of a run on a CPU, from which on a smaller network is named
_SMALLER = ("resnet50", "resnet18", "mobilenet_v3_small")
_WORTH_TELLING = 0.5  # of the time
_IMAGES = 4  # of the steps that are compared


def plan_batches(model: nn.Module, request: Request) -> Plan:
    """Return the fastest strategy and the largest micro-batch that fit, unless they are asked for.

    ``model`` is planned for as it is, in training mode, and gets the strategy.

    Raises:
        ResourceError: Nothing fits.
        UsageError: Only one image fits or is asked for, and BatchNorm cannot take it alone.
    """
    return name_ways(search(model, request, partial(measure_speed, model)), model)


def sharding_if_needed(plan: Callable[[Request], T], request: Request, recipe: TrainRecipe) -> T:
    """Return what ``plan`` finds for ``request`` or, if the recipe allows, with what is divided.

    Raises:
        ResourceError: Nothing fits.
    """
    try:
        return plan(request)
    except ResourceError:
        if recipe.shard != "auto" or not recipe.can_shard or request.processes == 1:
            raise
        return plan(replace(request, shards=request.processes))


def name_ways(plan: Plan, model: nn.Module) -> Plan:
    """Give ``model`` the strategy of ``plan``, and return the plan with its stages named."""
    plan.apply(model)
    return replace(plan, stages=_name_strategies(model))


def choose_network(model: nn.Module, request: Request, recipe: MomentumRecipe) -> NetworkChoice:
    """Return whether the plain ``model`` or its momentum network is to be trained, and how.

    Raises:
        ResourceError: Neither fits.
        UsageError: Only one image fits or is asked for, and BatchNorm cannot take it alone.
    """
    momentum = network.choose_rule(_sketch(model), recipe, wanted=True)
    if not network.read_gamma(momentum):
        return NetworkChoice("plain", search(model, request, partial(measure_speed, model)))
    return choose(model, momentum, request, cache(partial(measure_speed, model)))


def plan_momentum(model: nn.Module, request: Request) -> Plan:
    """Return the plan for a momentum ``model``, which says if the plain one would do better.

    Raises:
        ResourceError: It does not fit.
        UsageError: Only one image fits or is asked for, and BatchNorm cannot take it alone.
    """
    if request.strategy == "momentum":  # which the plain network has not
        return plan_batches(model, request)
    plain, find_speed = _sketch(model), cache(partial(measure_speed, model))
    for stage in momentum_stages(plain).values():
        stage.gamma = 0.0
    return name_ways(choose(plain, model, request, find_speed, wanted="momentum").plan, model)


def _sketch(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` without memory."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta", requires_grad=False)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def _name_strategies(model: nn.Module) -> str:
    """Return the way of each stage of ``model``."""
    stages: dict[str, list[str]] = {}
    for name, stage in momentum_stages(model).items():
        stages.setdefault(str(stage.way), []).append(name)
    if len(stages) <= 1:
        return next(iter(stages), "store")
    return ", ".join(f"{'+'.join(names)} {strategy}" for strategy, names in stages.items())


def plan_again(plan: Plan, request: Request, model: nn.Module) -> Plan:
    """Return the plan of a resumed run under ``request``, if possible with its micro-batch.

    Strategies give the same values, bit for bit, but BatchNorm sees the micro-batch.
    """
    peak = max(plan.predicted_bytes, plan.measured_bytes or 0)
    if plan.request == request and peak <= request.find_limit(model):
        plan.apply(model)
        return plan
    if request.micro_batch != "auto" or request.batch_size != plan.request.batch_size:
        return plan_batches(model, request)
    try:
        same = plan_batches(model, replace(request, micro_batch=plan.micro_batch))
    except ResourceError:
        return plan_batches(model, request)
    return replace(same, request=request)


def plan_together(plan: Plan, model: nn.Module, processes: Processes) -> Plan:
    """Return ``plan`` with the smallest micro-batch of all processes.

    Gradients are released in all of them, or in none, and the same is so of what is divided.

    Raises:
        ResourceError: A process is gone.
    """
    negative, some_keep, shards = processes.largest(
        -plan.micro_batch, not plan.request.release_gradients, plan.request.shards
    )
    request = replace(plan.request, release_gradients=not some_keep, shards=shards)
    if -negative == plan.micro_batch and request == plan.request:
        return plan
    smaller = plan_batches(model, replace(request, micro_batch=-negative))
    return replace(smaller, request=request)


def suggest_smaller(plan: Plan, model: nn.Module) -> str | None:
    """Return what to tell if a run would take hours on a CPU: the network that would not."""
    request, epoch = plan.request, plan.epoch_seconds
    if torch.device(request.device).type != "cpu" or epoch is None:
        return None
    total = epoch * request.epochs
    if total <= _LONG:
        return None
    speed = estimate_speed(request.device, request.precision)

    def time(network: nn.Module) -> float:
        return speed.seconds(Predictor(network, request).predict(_IMAGES).work)

    own, share, name = time(model), 1.0, ""
    for name in _SMALLER:
        share = time(outline(name).train()) / own
        if share * total <= _LONG / 2:
            break
    if share > _WORTH_TELLING:
        return None
    return f"with --model {name} it would be about {format_duration(share * total)} in all"


def warn_of_noise(plan: Plan, model: nn.Module) -> str | None:
    """Return what to tell if BatchNorm sees only a few images of a batch."""
    fewest = plan.sizes[-1]
    if fewest >= min(FEW, plan.request.batch) or not has_batch_norm(model):
        return None
    return (
        f"warning: BatchNorm sees only {fewest} of {plan.request.batch} images at a time, whose "
        "statistics are noise; --freeze-bn keeps the trained ones"
    )


def _describe_alternatives(plan: Plan) -> str:
    """Return a table of what was considered."""
    heads = ("", "memory", "at once", "an epoch", "fits", "what the network computes")
    return align([heads, *(_describe_alternative(plan, a) for a in plan.alternatives)])


def _describe_alternative(plan: Plan, alternative: Alternative) -> tuple[str, ...]:
    if alternative.network == "momentum":
        name, change = "momentum", "changes, but for calibration"
    else:
        name = f"plain, {'stored' if alternative.is_stored else 'recomputed'}"
        change = "stays"
    seconds = plan.request.count_seconds(alternative.seconds_per_image)
    return (
        name,
        format_bytes(alternative.predicted_bytes),
        str(alternative.micro_batch),
        format_duration(seconds),
        "yes" if alternative.fits else "no",
        change,
    )


def _describe_time(seconds: float, epochs: int) -> str:
    text = f"about {format_duration(seconds)} an epoch"
    return text if epochs == 1 else f"{text}, {format_duration(seconds * epochs)} in all"


def tell_of_plan(plan: Plan, model: nn.Module, listener: Listener) -> None:
    """Tell what was considered, how the batch is split, how long it takes, and what to mind."""
    if plan.alternatives:
        listener.tell(f"note: {plan.reason}\n{_describe_alternatives(plan)}")
    listener.tell(f"note: {plan}")
    if plan.reason and not plan.alternatives:
        listener.tell(f"note: {plan.reason}")
    if plan.is_calibrated and plan.epoch_seconds is not None:
        listener.tell(f"note: {_describe_time(plan.epoch_seconds, plan.request.epochs)}")
        if shorter := suggest_smaller(plan, model):
            listener.tell(f"note: {shorter}")
    device = torch.device(plan.request.device)
    if plan.request.precision == "fp32" and device.type == "cuda":
        listener.tell(f"note: fp32 on this GPU is {describe_tf32(device)}")
    if warning := warn_of_noise(plan, model):
        listener.tell(warning)

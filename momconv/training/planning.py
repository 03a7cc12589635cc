"""How a run fits its memory: planned by prediction, and checked against its first step."""

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from momconv.determinism import describe_tf32
from momconv.errors import ResourceError
from momconv.momentum.sequential import momentum_stages
from momconv.planner.outlook import FEW, has_batch_norm
from momconv.planner.plan import Plan, Request
from momconv.planner.search import search
from momconv.planner.speed import measure_speed
from momconv.training.processes import Processes
from momconv.training.progress import Listener


def plan_batches(model: nn.Module, request: Request) -> Plan:
    """Return the fastest strategy and the largest micro-batch that fit, unless they are asked for.

    ``model`` is planned for as it is, in training mode, and gets the strategy.

    Raises:
        ResourceError: Nothing fits.
        UsageError: Only one image fits or is asked for, and BatchNorm cannot take it alone.
    """
    found = search(model, request, partial(measure_speed, model))
    found.apply(model)
    return replace(found, stages=_name_strategies(model))


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

    Gradients are released in all of them, or in none.

    Raises:
        ResourceError: A process is gone.
    """
    negative, some_keep = processes.largest(-plan.micro_batch, not plan.request.release_gradients)
    request = replace(plan.request, release_gradients=not some_keep)
    if -negative == plan.micro_batch and request == plan.request:
        return plan
    smaller = plan_batches(model, replace(request, micro_batch=-negative))
    return replace(smaller, request=request)


def warn_of_noise(plan: Plan, model: nn.Module) -> str | None:
    """Return what to tell if BatchNorm sees only a few images of a batch."""
    fewest = plan.sizes[-1]
    if fewest >= min(FEW, plan.request.batch) or not has_batch_norm(model):
        return None
    return (
        f"warning: BatchNorm sees only {fewest} of {plan.request.batch} images at a time, whose "
        "statistics are noise; --freeze-bn keeps the trained ones"
    )


def tell_of_plan(plan: Plan, model: nn.Module, listener: Listener) -> None:
    """Tell how the batch is split, and what to mind."""
    listener.tell(f"note: {plan}")
    device = torch.device(plan.request.device)
    if plan.request.precision == "fp32" and device.type == "cuda":
        listener.tell(f"note: fp32 on this GPU is {describe_tf32(device)}")
    if warning := warn_of_noise(plan, model):
        listener.tell(warning)

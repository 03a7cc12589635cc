"""The work of an optimisation step: gradients of its micro-batches, and the change they make."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from momconv.planner.measurement import autocast
from momconv.states import in_eval_mode
from momconv.training.network import find_layout
from momconv.training.optimisation import set_rate
from momconv.training.run import TrainingRun


def add_gradients(
    run: TrainingRun,
    images: Tensor,
    labels: Tensor,
    share: float,
    before_backward: Callable[[], None] = lambda: None,
) -> Tensor:
    """Add the gradients of a micro-batch, ``share`` of its batch; return its part of the loss.

    The parts' losses, weighted so, sum to the mean loss over the batch, whatever their sizes.
    Weights of classes, whose mean over all images is 1, do not change what that is divided by.
    """
    layout = find_layout(run.recipe.train)
    images = images.to(run.device, non_blocking=True, memory_format=layout)
    labels = labels.to(run.device, non_blocking=True)
    smoothing = run.recipe.train.label_smoothing
    if run.class_weights is not None:
        labels, smoothing = weigh_labels(labels, run.class_weights, smoothing), 0.0
    with autocast(run.plan.precision, run.device):
        outputs = run.model(images)
        total = F.cross_entropy(outputs, labels, reduction="sum", label_smoothing=smoothing)
        loss = share / len(labels) * total
        before_backward()
        run.scaler.scale(loss).backward()
    return loss.detach()


def keep_company(run: TrainingRun) -> None:
    """Go through the network and back with nothing to learn, as all have to where it is divided.

    Buffers stay as they are, and gradients too.
    """
    side = run.plan.request.resolution
    nothing = torch.zeros(1, 3, side, side, device=run.device)
    with in_eval_mode(run.model):
        with autocast(run.plan.precision, run.device):
            outputs = run.model(nothing)
        (0 * outputs.float().sum()).backward()


def weigh_labels(labels: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Return smoothed probabilities (images, classes) with the weight of each image's class.

    ``F.cross_entropy(weight=…)`` would weigh the share of smoothing that other classes get by
    *their* weights: of a common image, the loss would be lowest where it is taken for a rare one.

    >>> weigh_labels(torch.tensor([0, 1]), torch.tensor([0.5, 4.0]), smoothing=0.2)
    tensor([[0.4500, 0.0500],
            [0.4000, 3.6000]])
    """
    if not labels.is_floating_point():  # not mixed
        labels = F.one_hot(labels, len(weights)).to(weights.dtype)
    weighed = labels * weights
    return torch.lerp(weighed, weighed.mean(1, keepdim=True), smoothing)


def take_step(run: TrainingRun, lr: float) -> None:
    """Change the weights by the gradients that have been added up, unless they did in backward.

    Until they are gone, all that training holds is there: the first time, the plan learns of it.
    """
    set_rate(run.optimizer, lr)
    if (clip := run.recipe.train.clip) is not None:
        clip_grad_norm_(run.model.parameters(), clip)
    run.scaler.step(run.optimizer)  # not where a gradient is too large for fp16
    run.scaler.update()
    if run.plan.measured_static_bytes is None and not run.head_only:
        run.plan = replace(run.plan, measured_static_bytes=run.count_static())
    run.optimizer.zero_grad()
    if run.average:
        run.average.update(run.model)

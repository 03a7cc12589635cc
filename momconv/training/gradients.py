"""The work of an optimisation step: gradients of its micro-batches, and the change they make."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from momconv.planner.measurement import autocast
from momconv.training.job import Job
from momconv.training.optimisation import set_rate


def add_gradients(job: Job, images: Tensor, labels: Tensor, share: float) -> Tensor:
    """Add the gradients of a micro-batch that is ``share`` of its batch; its part of the loss.

    The parts' losses, weighted so, sum to the mean loss over the batch, whatever their sizes.
    Weights of classes, whose mean over all images is 1, do not change what that is divided by.

    Raises:
        torch.OutOfMemoryError: The micro-batch does not fit the GPU.
    """
    images = images.to(job.device, non_blocking=True, memory_format=torch.channels_last)
    labels = labels.to(job.device, non_blocking=True)
    with autocast(job.plan.setting.precision, job.device):
        outputs = job.model(images)
        smoothing = job.recipe.train.label_smoothing
        total = F.cross_entropy(
            outputs,
            labels,
            weight=job.class_weights,
            reduction="sum",
            label_smoothing=smoothing,
        )
        loss = share / len(labels) * total
    job.scaler.scale(loss).backward()
    return loss.detach()


def take_step(job: Job, lr: float) -> None:
    """Change the weights by the gradients that have been added up."""
    set_rate(job.optimizer, lr)
    if (clip := job.recipe.train.clip) is not None:
        clip_grad_norm_(job.model.parameters(), clip)
    job.scaler.step(job.optimizer)  # not where a gradient is too large for fp16
    job.scaler.update()
    job.optimizer.zero_grad()
    if job.average:
        job.average.update(job.model)

"""Distilling the original network into the converted one, on unlabelled images."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from momconv.errors import DataError
from momconv.surgery.imitation import (
    CHUNK,
    Images,
    Imitation,
    OnStep,
    Schedule,
    imitate,
    norm_parameters,
    read_repeatedly,
    trainable_gains,
)

_RATE = 1e-4
_NORM_RATE = 2e-3
_PADDING = 8  # a random crop moves an image by up to one part in so many of its side


def distill(  # noqa: PLR0913 (one for each choice)
    student: nn.Module,
    teacher: nn.Module,
    batches: Iterable[Tensor],
    *,
    epochs: int = 6,
    minutes: float | None = None,
    trainable: Literal["all", "norms"] = "all",
    progress: OnStep | None = None,
) -> Imitation:
    """Train ``student`` to give the teacher's logits and stage outputs, without labels.

    The images are mirrored and moved at random. BatchNorm's running statistics stay as they are:
    call :func:`momconv.calibrate` first. The stages keep their strategy, which after a conversion
    is "auto", so that this takes the memory of fine-tuning the momentum network and no more.

    One image in five of the first eight batches is held out. However this ends, also by an
    exception, the student has the values with which it was closest to the teacher on them: at the
    beginning, after every 25 steps, or at the end. So a student never gets worse by their measure.
    Where calibration held out the same images, that is where ``batches`` begin with its batches,
    these are new to the student, and the comparison is fair.

    Args:
        student: The converted network, on any device. Its training flags stay as they are.
        teacher: The network that it was converted from, on the same device. It stays as it is.
        batches: Images (B, 3, H, W), preprocessed as for evaluation, read once an epoch.
        epochs: Passes over the images.
        minutes: Ends it earlier, if so long has passed; the learning rate falls accordingly.
        trainable: All parameters, or scale and shift of normalisation layers; both with the gains.
        progress: Hears of steps done, of all steps, and of the time left. A KeyboardInterrupt, from
            here too, ends the training early, and is reported in the result instead of raised.

    Raises:
        DataError: There are too few images to hold one out.
    """
    images = Images(batches)
    if not images.held_out:
        raise DataError(
            "too few images to distil from: none can be held out",
            kind="data.too_few_images",
            fix="give batches of 5 or more images",
        )
    norms = norm_parameters(student)
    with trainable_gains(student) as gains:
        groups = [(gains + norms, _NORM_RATE)]
        if trainable == "all":
            others = {id(parameter) for parameter in norms}
            rest = [p for p in student.parameters() if id(p) not in others and p.requires_grad]
            groups.append((rest, _RATE))
        schedule = Schedule(epochs * images.count_steps(), progress, minutes)
        steps = enumerate(read_repeatedly(images, schedule, CHUNK))
        augmented = ((_augment(chunk, seed=n), share) for n, (chunk, share) in steps)
        return imitate(student, teacher, groups, augmented, images.held_out)


def _augment(images: Tensor, *, seed: int) -> Tensor:
    """Return every image on its own mirrored half of the time, and moved by up to an eighth."""
    side = images.shape[-1]
    change = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(side, padding=side // _PADDING)])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return torch.stack([change(image) for image in images])

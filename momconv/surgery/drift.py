"""How far the outputs of a network are from those of another."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from momconv.errors import DataError, ModelFileError
from momconv.exhaustion import Parts
from momconv.states import in_eval_mode

Batch = Tensor | tuple[Tensor, Tensor]  # images (B, 3, H, W), which may come with labels (B,)


NONE = -1  # in place of a class
_Z = 1.959964  # of the normal distribution, for 95 %


def answers(logits: Tensor) -> Tensor:
    """Return the class of each row (images,), ``NONE`` where no probabilities come of it.

    >>> answers(torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [torch.inf, 1.0], [-torch.inf, 1.0]]))
    tensor([ 1, -1, -1,  1])
    """
    return logits.argmax(1).where(logits.softmax(1).isfinite().all(1), NONE)


@dataclass(frozen=True, slots=True)
class Drift:
    """The difference between the logits z' of a network and z of its original.

    Attributes:
        images: How many were compared.
        disagreements: On how many of them the two name different classes first, or one none.
        divergence: Mean KL(softmax z ‖ softmax z'), in nats.
        distance: ‖z' − z‖ / ‖z‖, over all images.
    """

    images: PositiveInt
    disagreements: int
    divergence: float
    distance: float

    @property
    def agreement(self) -> float:
        """The fraction of the images on which both name the same class first."""
        return 1 - self.disagreements / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of the agreement."""
        return wilson_interval(self.images - self.disagreements, self.images)

    def is_within(self, share: float) -> bool:
        """Return whether at most this share of the images disagrees."""
        return self.disagreements <= round(share * self.images, 9)

    def to_json(self) -> dict[str, Any]:
        """Return the same as values that JSON knows."""
        return {**asdict(self), "agreement": self.agreement, "interval": self.interval}


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share that ``hits`` of ``n`` show (Wilson 1927).

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    share, spread = hits / n, _Z**2 / n
    centre = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (centre - half) / (1 + spread)), min(1.0, (centre + half) / (1 + spread))


def measure_drift(logits: Tensor, reference: Tensor) -> Drift:
    """Return how far ``logits`` are from ``reference``; both (images, classes)."""
    z, other = reference.double(), logits.double()
    said, original = answers(other), answers(z)
    p, q = F.log_softmax(z, 1), F.log_softmax(other, 1)
    return Drift(
        images=len(z),
        disagreements=int(((said != original) | (original == NONE)).sum()),
        divergence=float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
        distance=float((other - z).norm() / z.norm()),
    )


class Reference:
    """What a network gives on some images, to compare others with.

    Attributes:
        network: The network.
    """

    def __init__(self, network: nn.Module, batches: Iterable[Batch]) -> None:
        """``batches`` are read again for every comparison.

        Raises:
            DataError: There are no images.
        """
        self.network = network
        self._batches = batches
        self._logits = _predict(network, batches)

    def require_answers(self) -> None:
        """Do nothing if the network says something of every image.

        Raises:
            ModelFileError: Its outputs are infinite or not a number.
        """
        if silent := int((answers(self._logits) == NONE).sum()):
            raise ModelFileError(
                f"the network's outputs are not finite for {silent} of {len(self._logits)} images, "
                "so there is nothing to keep",
                kind="model_file.no_answers",
                fix="take a checkpoint from before, or train again with a lower rate",
            )

    def compare(self, model: nn.Module) -> Drift:
        """Return how far the outputs of ``model`` are from the network's."""
        return measure_drift(_predict(model, self._batches), self._logits)


def split(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return the images and, where there are any, the labels."""
    return (batch, None) if isinstance(batch, Tensor) else (batch[0], batch[1])


def require_images(batches: list[Tensor]) -> Tensor:
    """Return all of ``batches`` in one.

    Raises:
        DataError: There are none.
    """
    if not batches:
        raise DataError(
            "there are no images to compare the networks on",
            kind="data.no_images",
            fix="give at least one batch",
        )
    return torch.cat(batches)


def _predict(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    device, parts = next(model.parameters()).device, Parts()
    with in_eval_mode(model), torch.no_grad():
        images = (split(batch)[0] for batch in batches)
        return require_images([parts.forward(model, few, device).cpu() for few in images])

"""What a conversion saves, and the time that it costs."""

from dataclasses import dataclass

from torch import nn

from momconv.planner.cost import estimate_speed
from momconv.planner.prediction import Predictor, StepPrediction, Training
from momconv.zoo.description import describe

IMAGES = 32  # of the step that is predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """What a training step allocates for an image, in bytes; weights and the like not counted.

    Attributes:
        resolution: Pixels of the image's sides.
        store_bytes: In the plain network with everything stored.
        auto_bytes: In the converted one, under "auto".
        relative_seconds: The time of its step, about, as a multiple of the plain network's.
    """

    resolution: int
    store_bytes: int
    auto_bytes: int
    relative_seconds: float

    @property
    def saved(self) -> float:
        """The share of the memory that is saved; below 0 where the conversion costs memory."""
        return 1 - self.auto_bytes / self.store_bytes


def predict_saving(plain: nn.Module, converted: nn.Module) -> Saving:
    """Predict steps of ``IMAGES`` images, of the resolution that ``plain`` is described with."""
    resolution = describe(plain).preprocessing.resolution
    training = Training(resolution)
    store, auto = (_predict(model, training) for model in (plain, converted))
    speed = estimate_speed(training.device, training.precision)
    return Saving(
        resolution=resolution,
        store_bytes=store.peak.step // IMAGES,
        auto_bytes=auto.peak.step // IMAGES,
        relative_seconds=speed.seconds(auto.work) / speed.seconds(store.work),
    )


def _predict(model: nn.Module, training: Training) -> StepPrediction:
    predictor = Predictor(model, training)
    predictor.model.train()
    return predictor.predict(IMAGES)

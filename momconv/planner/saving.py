"""What a conversion saves, and the time that it costs."""

from torch import nn

from momconv.catalogue import Saving
from momconv.planner.cost import estimate_speed
from momconv.planner.prediction import Predictor, StepPrediction, Training
from momconv.zoo.description import describe

IMAGES = 32  # of the step that is predicted


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

"""Networks in another mode for a while."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Eval mode inside; the training flags as before afterwards, also those changed inside."""
    with _restoring(models):
        for model in models:
            model.eval()
        yield


@contextmanager
def in_training_mode(*models: nn.Module) -> Iterator[None]:
    """The same for training mode; a model in it already stays as it is, frozen parts included."""
    with _restoring(models):
        for model in models:
            if not model.training:
                model.train()
        yield


@contextmanager
def _restoring(models: Sequence[nn.Module]) -> Iterator[None]:
    training = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training

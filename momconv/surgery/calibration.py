"""Re-estimating BatchNorm's statistics on unlabelled images after a conversion."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace BatchNorm's running statistics by their average over ``batches``.

    The momentum rule shifts the distribution of activations; statistics of the plain network no
    longer fit. No label is used and no parameter changes.

    Args:
        model: The network, on any device. Its training flags are left as they are.
        batches: Images (B, 3, H, W), preprocessed as for evaluation. Every batch counts the same,
            so they should be of one size, and large: 100 images or more.

    Returns:
        How many BatchNorm layers were re-estimated.
    """
    device = next(model.parameters()).device
    with _estimating(model) as layers, torch.no_grad():
        for images in batches:
            model(images.to(device))
    return len(layers)


@contextmanager
def _estimating(model: nn.Module) -> Iterator[list[_BatchNorm]]:
    """BatchNorm alone in training mode, averaging from nothing; afterwards all flags as before."""
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    training = {module: module.training for module in model.modules()}
    momenta = {layer: layer.momentum for layer in layers}
    model.eval()
    for layer in layers:
        layer.train()
        layer.reset_running_stats()
        layer.momentum = None  # the plain average of all batches
    try:
        yield layers
    finally:
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for module, was_training in training.items():
            module.training = was_training

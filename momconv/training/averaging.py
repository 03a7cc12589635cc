"""The exponential moving average of a network over the steps of its training."""

from collections.abc import Mapping

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average:
    """The average of a network's weights and of BatchNorm's statistics.

    Early on it forgets faster, with a decay of (1 + n) / (10 + n) after n steps as in TensorFlow's
    ``ExponentialMovingAverage``; otherwise short runs would end close to where they began.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._averaged = AveragedModel(model, use_buffers=True)

    @property
    def model(self) -> nn.Module:
        """The network with the averages; it is not for training."""
        model: nn.Module = self._averaged.module
        return model

    def update(self, model: nn.Module) -> None:
        """Take in what ``model`` is after a step."""
        n = int(self._averaged.n_averaged)
        decay = min(self._decay, (1 + n) / (10 + n))
        self._averaged.multi_avg_fn = get_ema_multi_avg_fn(decay)
        self._averaged.update_parameters(model)

    def tensors(self) -> dict[str, Tensor]:
        """All that it remembers."""
        return dict(self._averaged.state_dict())

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``tensors``."""
        self._averaged.load_state_dict(tensors)

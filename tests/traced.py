"""Steps that were predicted in one run, for the next ones that plan the same."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

from momconv.momentum.sequential import set_strategy
from momconv.planner.prediction import Predictor, StepPrediction, Training
from momconv.vocabulary import Strategies

_known: dict[Hashable, StepPrediction] = {}


@contextmanager
def tracing_once() -> Iterator[None]:
    """Inside, a step on a CPU is traced once, in however many runs it is planned."""
    trace = Predictor.predict

    def predict(
        self: Predictor, batch: int, strategy: Strategies | None = None, **changes: Any
    ) -> StepPrediction:
        if strategy is not None:
            set_strategy(self.model, strategy)
        training = replace(self.training, **changes)
        step = _describe(self.model, training, batch)
        if step in _known:
            return _known[step]
        prediction = trace(self, batch, **changes)
        if training.device == "cpu" and step == _describe(self.model, training, batch):
            _known[step] = prediction  # else it has found the network's runs
        return prediction

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Predictor, "predict", predict)
        yield


def _describe(model: nn.Module, training: Training, batch: int) -> Hashable:
    """All that a prediction can depend on."""
    facts = (getattr(training, field.name) for field in fields(Training) if field.name != "_")
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers())
    layouts = ((n, t.shape, t.stride(), t.dtype, t.requires_grad) for n, t in tensors)
    modules = (
        (name, type(module), *_describe_module(module)) for name, module in model.named_modules()
    )
    return torch.get_num_threads(), batch, *facts, *layouts, *modules


def _describe_module(module: nn.Module) -> Iterator[Hashable]:
    """Its attributes, but for what a network says of itself, and the hooks on it."""
    for name, value in vars(module).items():
        if name.endswith("_hooks"):
            yield name, *(getattr(hook, "__qualname__", hook) for hook in value.values())
        elif name != "description" and not isinstance(value, dict | set | frozenset):
            yield name, repr(value)

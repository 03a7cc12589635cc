"""momconv: fine-tune pretrained residual networks in less memory, with invertible momentum blocks.

The public names are imported when they are first used, so that ``momconv --help`` need not wait
for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from momconv._version import __version__

if TYPE_CHECKING:
    from momconv.data.unseen import keep_unseen
    from momconv.evaluation import evaluate
    from momconv.files.model_file import load, save
    from momconv.momentum.sequential import MomentumSequential, set_strategy
    from momconv.planner.prediction import peak_memory
    from momconv.planner.search import plan
    from momconv.prediction import predict
    from momconv.surgery.calibration import calibrate
    from momconv.surgery.certificate import certify
    from momconv.surgery.conversion import convert, revert
    from momconv.surgery.distillation import distill
    from momconv.training.finetuning import finetune
    from momconv.training.gradients import release_gradients
    from momconv.zoo.weights import load_network

__all__ = [
    "MomentumSequential",
    "__version__",
    "calibrate",
    "certify",
    "convert",
    "distill",
    "evaluate",
    "finetune",
    "keep_unseen",
    "load",
    "load_network",
    "peak_memory",
    "plan",
    "predict",
    "release_gradients",
    "revert",
    "save",
    "set_strategy",
]

_HOMES = {
    "MomentumSequential": "momentum.sequential",
    "calibrate": "surgery.calibration",
    "certify": "surgery.certificate",
    "convert": "surgery.conversion",
    "distill": "surgery.distillation",
    "evaluate": "evaluation",
    "finetune": "training.finetuning",
    "keep_unseen": "data.unseen",
    "load": "files.model_file",
    "load_network": "zoo.weights",
    "peak_memory": "planner.prediction",
    "plan": "planner.search",
    "predict": "prediction",
    "release_gradients": "training.gradients",
    "revert": "surgery.conversion",
    "save": "files.model_file",
    "set_strategy": "momentum.sequential",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'momconv' has no attribute {name!r}")
    return getattr(import_module(f"momconv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""The network of a run before its first step."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.data.dataset import LabelledImages, make_loader, read_batches
from momconv.data.folder import ImageSet
from momconv.data.transforms import evaluation_transform
from momconv.files import model_file
from momconv.momentum.sequential import momentum_stages
from momconv.recipe import ModelRecipe, Recipe
from momconv.surgery.calibration import calibrate
from momconv.surgery.conversion import convert
from momconv.training.batches import split_epoch
from momconv.training.progress import Listener
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import replace_head
from momconv.zoo.weights import load_network

_CALIBRATION_IMAGES = 2000
_CALIBRATION_BATCH = 100


def load(recipe: Recipe) -> nn.Module:
    """The recipe's network with momentum stages, for its resolution.

    Raises:
        UsageError: There is no such network, or nothing in it to convert as asked.
        ModelFileError: Its file is missing, damaged or of another kind.
        ResourceError: Its weights cannot be downloaded.
    """
    if recipe.model.from_file is not None:
        model = model_file.load(recipe.model.from_file)
    else:
        plain = load_network(recipe.model.name, recipe.model.weights)
        how = recipe.momentum
        model = convert(plain, how.gamma, how.stages, how.velocity, gain=how.gain)
    if recipe.data.resolution is not None:
        description = describe(model)
        preprocessing = description.preprocessing.at(recipe.data.resolution)
        attach(model, replace(description, preprocessing=preprocessing))
    return model


def fit_head(model: nn.Module, classes: tuple[str, ...]) -> None:
    """Give ``model`` a new head, unless its own has the same ``classes``."""
    if describe(model).classes != classes:
        replace_head(model, classes)


def place(model: nn.Module, device: torch.device) -> None:
    """Move ``model`` to ``device``."""
    # cuDNN's fast kernels want the channels last.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]


def start_training(model: nn.Module, *, freeze_bn: bool) -> None:
    """Put ``model`` in training mode, but for BatchNorm's statistics and weights if frozen."""
    model.train()
    if freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval().requires_grad_(requires_grad=False)


def name_strategies(model: nn.Module) -> str:
    """How backward gets the activations of each stage of ``model``."""
    stages: dict[str, list[str]] = {}
    for name, stage in momentum_stages(model).items():
        stages.setdefault(stage.strategy, []).append(name)
    if len(stages) <= 1:
        return next(iter(stages), "store")
    return ", ".join(f"{'+'.join(names)} {strategy}" for strategy, names in stages.items())


def has_momentum(model: nn.Module) -> bool:
    """Whether any block of ``model`` follows the momentum rule."""
    return any(stage.gamma and stage.runs for stage in momentum_stages(model).values())


def needs_calibration(model: nn.Module, recipe: ModelRecipe) -> bool:
    """Whether ``model`` was converted just now, with weights worth keeping."""
    return has_momentum(model) and recipe.from_file is None and recipe.weights != "none"


def calibrate_on(
    model: nn.Module, images: ImageSet, *, batch_size: int, workers: int, listener: Listener
) -> None:
    """Re-estimate BatchNorm's statistics on some of the training images.

    Without this a converted network starts at chance: the momentum rule shifts what BatchNorm sees.
    """
    chosen = split_epoch(len(images.samples), _CALIBRATION_IMAGES, seed=0, epoch=0)[0]
    size = min(batch_size, _CALIBRATION_BATCH, len(chosen))
    chosen = chosen[: len(chosen) // size * size]  # as every batch counts the same
    transform = evaluation_transform(describe(model).preprocessing)
    dataset = LabelledImages(images.select(chosen), transform, seed=None)
    loader = make_loader(dataset, workers=workers, batch_size=size)

    def read() -> Iterator[Tensor]:
        for done, (pictures, _) in enumerate(read_batches(loader)):
            listener.advance("adapting BatchNorm to momentum", done * size, len(dataset))
            yield pictures

    calibrate(model, read())

"""The network of a run: loaded, converted, with a head for its classes, and made to train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from momconv.errors import UsageError
from momconv.files import model_file
from momconv.momentum.sequential import momentum_stages
from momconv.recipe import (
    ANNEAL_FROM,
    DataRecipe,
    ModelRecipe,
    MomentumRecipe,
    Recipe,
    TrainRecipe,
    names_code,
)
from momconv.surgery.conversion import convert, set_gamma
from momconv.zoo import own
from momconv.zoo.description import attach, describe
from momconv.zoo.networks import check_resolution, find_head, replace_head
from momconv.zoo.preparation import Preparation, describe_assumption, prepare_as
from momconv.zoo.seen import SeenImages
from momconv.zoo.stages import freeze
from momconv.zoo.weights import load_network

_PROGRAMS = 1024  # compiled, for all shapes of all blocks, which share their code
_BACKEND = "inductor"  # of torch.compile


def load(recipe: Recipe, tell: Callable[[str], None] = lambda _text: None) -> nn.Module:
    """Return the recipe's network with its stages, for its resolution.

    Its blocks follow the momentum rule if that is wanted at any rate, or it comes from a file so.

    ``tell`` hears what of a file was taken.

    Raises:
        UsageError: There is no such network, or nothing in it to convert as asked, or momentum is
            not wanted in a file that has it.
        ModelFileError: Its file is missing, damaged or of another kind.
        ResourceError: Its weights cannot be downloaded.
    """
    if recipe.model.from_file is not None:
        model = model_file.load(recipe.model.from_file, make_own(recipe.model))
        if recipe.momentum.use == "never" and read_gamma(model):
            raise UsageError(
                "--momentum never: the network of --from is a momentum network",
                kind="usage.conflict",
                fix="momconv convert --back FILE -o plain.pth",
            )
    else:
        plain = load_plain(recipe.model, read_preparation(recipe.data).side, tell)
        if recipe.model.weights == "none" and not names_code(recipe.model.name):
            attach(plain, replace(describe(plain), seen=SeenImages(complete=True)))
        model = choose_rule(plain, recipe.momentum, wanted=recipe.momentum.use == "always")
    said = read_preparation(recipe.data)
    if said.side is not None:
        check_resolution(model, said.side)
    prepare_as(model, said)
    if note := describe_assumption(model):
        tell(note)
    attach(model, replace(describe(model), assumed=False))  # it learns with them, whatever they are
    return model


def read_preparation(recipe: DataRecipe) -> Preparation:
    """Return what the recipe says of how images become the network's input."""
    names = ("resolution", "resize", "crop", "mean", "std", "interpolation")
    return Preparation(**{name: getattr(recipe, name) for name in names})


def choose_rule(model: nn.Module, recipe: MomentumRecipe, *, wanted: bool) -> nn.Module:
    """Return ``model`` as a momentum network or, unless that is wanted, as the plain one.

    Raises:
        UsageError: There is nothing in it to convert as asked.
    """
    gamma = gamma_at(recipe, epochs=0) if wanted else 0.0
    return convert(model, gamma, recipe.stages, recipe.velocity, gain=recipe.gain)


def load_plain(
    recipe: ModelRecipe,
    resolution: int | None,
    tell: Callable[[str], None] = lambda _text: None,
) -> nn.Module:
    """Return the network as it was before its conversion; its head may be a new one."""
    arguments = own.parse_arguments(recipe.arguments)
    return load_network(
        recipe.name, recipe.weights, arguments, resolution=resolution, new_head=True, tell=tell
    )


def make_own(recipe: ModelRecipe) -> nn.Module | None:
    """Return what the recipe's function makes, which files of it need; None without one."""
    if not own.is_own(recipe.name):
        return None
    return own.make(recipe.name, own.parse_arguments(recipe.arguments))


def fit_head(model: nn.Module, classes: tuple[str, ...]) -> None:
    """Give ``model`` a new head, unless its own has the same ``classes``."""
    if describe(model).classes != classes:
        replace_head(model, classes)


@contextmanager
def wearing(model: nn.Module, head: nn.Module) -> Iterator[None]:
    """Inside, the final layer of ``model`` is ``head``."""
    name = find_head(model)
    own = model.get_submodule(name)
    model.set_submodule(name, head)
    try:
        yield
    finally:
        model.set_submodule(name, own)


def find_layout(recipe: TrainRecipe) -> torch.memory_format:
    """Return how weights and images lie in memory."""
    # cuDNN's fast kernels want the channels last. With oneDNN's a step of a ResNet-50 takes 5 to
    # 7 % less time, one of a ResNet-18 8 to 16 % (one thread of an AMD EPYC, torch 2.14).
    return torch.channels_last if recipe.channels_last else torch.contiguous_format


def place(model: nn.Module, device: torch.device, recipe: TrainRecipe) -> None:
    """Move ``model`` to ``device``, in the recipe's layout."""
    model.to(device=device, memory_format=find_layout(recipe))  # type: ignore[call-overload]


def start_training(model: nn.Module, recipe: TrainRecipe) -> None:
    """Put ``model`` in training mode, but for what the recipe freezes."""
    model.train()
    freeze(model, recipe.freeze)
    if recipe.freeze_bn:
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.eval().requires_grad_(requires_grad=False)


def require_synchronisable(recipe: TrainRecipe, device: torch.device) -> None:
    """Do nothing unless BatchNorm is to be synchronised on a ``device`` that cannot do that.

    Raises:
        UsageError: It is.
    """
    if recipe.sync_bn and device.type != "cuda":
        raise UsageError(
            f"--sync-bn: PyTorch's SyncBatchNorm does not run on the device {device}, only on GPUs",
            kind="usage.sync_bn_device",
            fix="--freeze-bn",
        )


def synchronise(model: nn.Module) -> None:
    """Let each BatchNorm of ``model`` see the micro-batches of all processes at once."""
    nn.SyncBatchNorm.convert_sync_batchnorm(model)


def read_gamma(model: nn.Module) -> float:
    """Return γ of the blocks of ``model`` that follow the momentum rule; 0 if none does."""
    stages = momentum_stages(model).values()
    return max((stage.gamma for stage in stages if stage.runs), default=0.0)


def gamma_at(recipe: MomentumRecipe, epochs: float) -> float:
    """Return γ of the step before which so many epochs are done: in a straight line to its target.

    It may start small, where the network is still close to the plain one.

    >>> recipe = MomentumRecipe(gamma=0.9, anneal=2)
    >>> [round(gamma_at(recipe, epochs), 2) for epochs in (0, 0.5, 1, 2, 3)]
    [0.1, 0.3, 0.5, 0.9, 0.9]
    """
    if epochs >= recipe.anneal:
        return recipe.gamma
    return ANNEAL_FROM + (recipe.gamma - ANNEAL_FROM) * epochs / recipe.anneal


def anneal(model: nn.Module, recipe: MomentumRecipe, epochs: float) -> None:
    """Give ``model`` the γ of its next step. Without annealing it keeps its own."""
    if recipe.anneal and recipe.use != "never":
        set_gamma(model, gamma_at(recipe, epochs), gain=recipe.gain)


@contextmanager
def compiling(model: nn.Module, *, wanted: bool) -> Iterator[None]:
    """Inside, the residual blocks of ``model`` are compiled when they are called, if ``wanted``.

    What runs them stays as it is, so momentum is as exact as before: both runs of a block are the
    same compiled program. It is made for each shape of its input, since kernels for any shape may
    round differently, and which ones there are would depend on where a run was resumed.
    """
    if not wanted:
        yield
        return
    from torch._dynamo import config  # takes a second

    for block in _blocks(model):
        block.compile(backend=_BACKEND, dynamic=False)
    # Dynamo alone would give up after a few shapes.
    with config.patch(recompile_limit=_PROGRAMS, accumulated_recompile_limit=_PROGRAMS):
        yield


@contextmanager
def uncompiled(*, wanted: bool) -> Iterator[None]:
    """Inside, all blocks run as they would without compilation, if ``wanted``."""
    if wanted:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for child in model.children():
        if isinstance(child, nn.Sequential):
            inner = [block for block in child if isinstance(block, nn.Sequential)]
            yield from _blocks(child) if inner else child

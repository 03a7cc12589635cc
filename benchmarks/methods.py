"""The ways to train one network that the benchmarks compare."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import nn
from torchvision.models import get_model

from benchmarks.checkpointing import checkpoint_each_block, checkpoint_sqrt
from benchmarks.compilation import compile_within
from benchmarks.couplings import memcnn, revtorch, store_couplings
from benchmarks.stages import find_runs
from momconv import convert, set_strategy
from momconv.zoo.networks import build, names

RESNETS = ("resnet*", "cifar_resnet*")
QUICK_TO_COMPILE = ("cifar_resnet20", "cifar_resnet110")  # minutes on two cores


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train a network.

    Attributes:
        name: In the tables.
        prepare: Makes the network ready to be trained in this way.
        stored: The key of the method that stores all activations of the very same network.
        networks: Patterns of the names of the networks that it is applied to.
        package: What has to be installed for it.
        warms_up: Whether its first step does what later ones need not do.
    """

    name: str
    prepare: Callable[[nn.Module], nn.Module]
    stored: str = "store"
    networks: tuple[str, ...] = ("*",)
    package: str = "torch"
    warms_up: bool = False

    def applies_to(self, network: str) -> bool:
        """Whether the network is one of its kind, and its package is installed."""
        known = any(fnmatch(network, pattern) for pattern in self.networks)
        return known and find_spec(self.package) is not None

    @property
    def label(self) -> str:
        """Its name, with the version of a package other than torch."""
        return self.name if self.package == "torch" else f"{self.name} {version(self.package)}"


def make_network(name: str) -> nn.Module:
    """Any network of momconv or torchvision, with random weights, in training mode."""
    torch.manual_seed(0)
    model: nn.Module = build(name) if name in names() else get_model(name)
    return model.train()


def store(model: nn.Module) -> nn.Module:
    """The plain network, which keeps every activation."""
    return model


def store_momentum(model: nn.Module) -> nn.Module:
    """The momentum network with every activation kept."""
    model = convert(model)
    set_strategy(model, "store")
    return model


def momconv(model: nn.Module) -> nn.Module:
    """The momentum network with the strategy that momconv chooses."""
    return convert(model)


def momentumnet(model: nn.Module) -> nn.Module:
    """The package of the paper's authors."""
    from momentumnet import transform_to_momentumnet

    stages = [name for name, runs in find_runs(model).items() if runs]
    # is_residual=False: the blocks end in x + f(x), so the package subtracts x.
    converted: nn.Module = transform_to_momentumnet(
        model, sub_layers=stages, gamma=0.9, use_backprop=False, is_residual=False
    )
    return converted


# By what the command line calls them.
METHODS = {
    "store": Method("store all", store),
    "checkpoint": Method("checkpoint each block", checkpoint_each_block),
    "checkpoint-sqrt": Method("checkpoint √L blocks", checkpoint_sqrt),
    **{
        f"compile-{budget}": Method(
            f"torch.compile, budget {budget}",
            partial(compile_within, float(budget)),
            networks=QUICK_TO_COMPILE,
            warms_up=True,
        )
        for budget in ("0.5", "0.2", "0")
    },
    "memcnn": Method("memcnn", memcnn, "store-couplings", RESNETS, "memcnn"),
    "revtorch": Method("revtorch", revtorch, "store-couplings", RESNETS, "revtorch"),
    "momentumnet": Method("momentumnet", momentumnet, "store-momentum", package="momentumnet"),
    "momconv": Method("momconv", momconv, "store-momentum"),
}

# What their times are compared with: the same computation without any saving of memory.
BASES = {
    "store-couplings": Method("store all, couplings", store_couplings, "store-couplings", RESNETS),
    "store-momentum": Method("store all, momentum", store_momentum, "store-momentum"),
}


def select(network: str, chosen: list[str]) -> list[str]:
    """The keys of the methods that apply to ``network``, among the chosen ones if there are any."""
    return [
        key
        for key, method in METHODS.items()
        if method.applies_to(network) and (not chosen or key in chosen)
    ]

import copy

import pytest
import torch
from torch import nn
from torchvision.models.resnet import Bottleneck

from benchmarks.couplings import make_coupling, store_couplings
from momconv.zoo.networks import build


def count_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.ndim == 4)


def test_a_coupling_keeps_the_shape_at_half_of_the_block_s_weights() -> None:
    block = Bottleneck(64, 16)
    coupling = make_coupling(block)
    x = torch.randn(2, 64, 5, 5)
    assert coupling(x).shape == x.shape
    assert count_weights(coupling) * 2 == count_weights(block)


def test_a_coupling_is_inverted_by_subtracting_what_it_added() -> None:
    coupling = make_coupling(Bottleneck(64, 16)).double().eval()
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    y1, y2 = coupling(x).chunk(2, dim=1)
    x2 = y2 - coupling.g(y1)
    x1 = y1 - coupling.f(x2)
    torch.testing.assert_close(torch.cat([x1, x2], dim=1), x)


def test_only_runs_are_replaced_and_the_network_keeps_its_output() -> None:
    model = build("cifar_resnet20").train()
    images = torch.randn(2, 3, 32, 32)
    coupled = store_couplings(copy.deepcopy(model))
    assert coupled(images).shape == model(images).shape
    kinds = {
        name: [type(block).__name__ for block in coupled.get_submodule(name).children()]
        for name in ("layer1", "layer2", "layer3")
    }
    # The first block of the first stage keeps its shape, those of the others do not.
    assert kinds == {
        "layer1": ["Sequential"],
        "layer2": ["CifarBlock", "Sequential"],
        "layer3": ["CifarBlock", "Sequential"],
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("package", ["memcnn", "revtorch"])
def test_packages_train_the_couplings_that_ordinary_autograd_trains(package: str) -> None:
    pytest.importorskip(package)
    from benchmarks.exactness import PACKAGES, compare

    assert max(compare(PACKAGES[package][0], 3)) < 1e-5

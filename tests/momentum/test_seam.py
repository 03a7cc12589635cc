"""momentum/faster/ may be deleted: nothing changes but memory and time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import (
    Dropping,
    Scaled,
    aftermath,
    differences,
    images,
    square,
    stack,
    under_bf16_autocast,
)
from torch import Tensor

from momconv import MomentumSequential
from momconv.vocabulary import STRATEGIES


def leave_everything() -> dict[str, Tensor]:
    """What a step of each strategy leaves behind in several networks, by names of them all."""
    left: dict[str, Tensor] = {}
    torch.manual_seed(0)
    networks = {
        "norms": stack(3, gamma=0.9),
        "random numbers": MomentumSequential(*(Dropping() for _ in range(3)), gamma=1.0),
        "remainders put aside": MomentumSequential(*(Scaled() for _ in range(40)), gamma=0.5),
    }
    for name, net in networks.items():
        for strategy in STRATEGIES:
            for step in (lambda net, x: square(net(x)), under_bf16_autocast):
                found = aftermath(net, images(), strategy, step)
                left |= {f"{name}, {strategy}, {step.__name__}, {key}": found[key] for key in found}
    return left


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """:func:`leave_everything` of a process in which the folder cannot be imported."""
    path = tmp_path_factory.mktemp("seam") / "left.pt"
    code = (
        "import sys, torch; sys.modules['momconv.momentum.faster'] = None; import test_seam;"
        f"torch.save(test_seam.leave_everything(), {str(path)!r})"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    left: dict[str, Tensor] = torch.load(path)
    return left


def test_every_bit_is_the_same_without_what_makes_it_faster(without: dict[str, Tensor]) -> None:
    assert differences(without, leave_everything()) == []


def test_gradients_are_exact_without_what_makes_it_faster(without: dict[str, Tensor]) -> None:
    stored = {key: value for key, value in without.items() if ", store, " in key}
    assert len(stored) == len(without) / len(STRATEGIES)
    for strategy in STRATEGIES:
        ours = {key: without[key.replace(", store, ", f", {strategy}, ")] for key in stored}
        assert differences(ours, stored) == []

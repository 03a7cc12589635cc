import copy
from pathlib import Path

import pytest
import torch
from runs import Signals, read_tensors, small
from torch import nn

from momconv.determinism import deterministic
from momconv.momentum.sequential import set_strategy
from momconv.surgery.conversion import convert
from momconv.training import compilation
from momconv.training.compilation import compiling, uncompiled
from momconv.training.finetuning import finetune
from momconv.training.interruption import Interrupted
from momconv.zoo.networks import build

WHOLE = ["train.batch_size=6", "train.micro_batch=6"]  # one shape
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"  # dynamo's own
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler without its last and slowest part; tests/momentum has it whole."""
    monkeypatch.setattr(compilation, "_BACKEND", "aot_eager")


def test_all_blocks_are_compiled_and_momentum_stays_exact() -> None:
    torch.manual_seed(0)
    model, found = convert(build("cifar_resnet20"), 0.9, "all").train(), []
    images = torch.randn(3, 3, 32, 32)
    for strategy in ("store", "momentum"):
        own = copy.deepcopy(model)
        set_strategy(own, strategy)
        with compiling(own, wanted=True):
            own(images).square().sum().backward()
        blocks = [b for s in own.children() if isinstance(s, nn.Sequential) for b in s]
        assert len(blocks) == 9
        assert all(block._compiled_call_impl is not None for block in blocks)
        found.append([parameter.grad for parameter in own.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    with uncompiled(wanted=True), torch.no_grad():
        assert torch.equal(own.eval()(images), copy.deepcopy(own)(images))


def test_a_compiled_run_goes_on_exactly(colours: Path, tmp_path: Path) -> None:
    changes = ["train.compile=true", "train.deterministic=true", "train.clip=0.5"]
    recipe = small(colours, *changes, "train.epochs=1", *WHOLE)
    finetune(recipe, tmp_path / "straight")
    with pytest.raises(Interrupted):
        finetune(recipe, tmp_path / "run", listener=Signals(2))
    finetune(recipe, tmp_path / "run", resume=True)
    ours, theirs = read_tensors(tmp_path / "run"), read_tensors(tmp_path / "straight")
    assert not [key for key, value in ours.items() if not torch.equal(value, theirs[key])]


def test_deterministic_algorithms_are_asked_for_and_given_back() -> None:
    with deterministic(wanted=True):
        assert torch.get_deterministic_debug_mode() == 1
    assert torch.get_deterministic_debug_mode() == 0
    with deterministic(wanted=False):
        assert torch.get_deterministic_debug_mode() == 0

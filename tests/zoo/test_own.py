"""Networks that somebody else wrote, by docs/own-network.md."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import momconv
from momconv.cli import app
from momconv.errors import UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.zoo import own
from momconv.zoo.description import describe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-network.md"
MODULE, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
(COMMANDS,) = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's module, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    path = tmp_path / "mine.py"
    path.write_text(MODULE, encoding="utf-8")
    return path


def test_the_commands_of_the_page_work(mine: Path) -> None:
    for line in COMMANDS.splitlines():
        result = CliRunner().invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    plain = torch.load(mine.with_name("plain.pth"), weights_only=True)
    own.make("mine.py:make", {"depth": 8, "width": 8}).load_state_dict(plain, strict=True)
    with pytest.raises(UsageError, match=r"a network of your own, made by mine\.py:make"):
        momconv.load("mine.safetensors")


def test_the_python_of_the_page_works_and_its_gradients_are_exact(mine: Path) -> None:
    names: dict[str, Any] = {}
    exec(USE, names)
    model: nn.Module = names["model"]
    (stage,) = momentum_stages(model).values()
    assert [(run.start, run.stop) for run in stage.runs or ()] == [(0, 6)]
    assert names["plain"].state_dict().keys() == model.state_dict().keys()
    assert type(names["plain"].blocks) is nn.ModuleList
    gradients = []
    for strategy in ("store", "momentum"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        torch.manual_seed(0)
        model(torch.ones(2, 3, 16, 16)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_a_loaded_network_of_ones_own_computes_what_was_saved(mine: Path) -> None:
    model = momconv.convert(own.make("mine:make", {"classes": 5}, resolution=16)).eval()
    momconv.save(model, "file.safetensors")
    loaded = momconv.load("file.safetensors", own.make("mine:make"))  # another number of classes
    assert torch.equal(loaded(torch.ones(1, 3, 16, 16)), model(torch.ones(1, 3, 16, 16)))
    assert describe(loaded).architecture == "mine:make"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mine.py:made", {}, "has no function 'made'"),
        ("other.py:make", {}, "file does not exist: other.py"),
        ("no.such.module:make", {}, "no module 'no.such.module'"),
        ("mine.py:make", {"depht": 3}, "unexpected keyword argument 'depht'"),
        ("mine.py:torch", {}, "has no function 'torch'"),
        ("fractions:Fraction", {}, "makes a Fraction"),
    ],
)
def test_what_makes_no_network_is_explained(
    mine: Path, name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        own.make(name, arguments)


class Loop(nn.Module):
    """Six blocks in a ModuleList, called in some way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(Conditioned() for _ in range(6))

    def forward(self, x: Tensor) -> Any:
        collected, condition = [], x.mean()
        for n, block in enumerate(self.blocks):
            if self.way == "pool in between" and n == 3:
                x = x.roll(1)
            x = self.blocks[n](x, condition) if self.way == "by index" else block(x, condition)
            collected.append(x)
        return torch.cat(collected) if self.way == "collect" else x


class Conditioned(nn.Module):
    """A block with another argument."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + torch.tanh(self.layer(x) * condition)


def test_a_loop_may_pass_further_arguments() -> None:
    x = torch.randn(3, 4)
    model = momconv.convert(Loop("plain"), inputs=[x])
    model(x).sum().backward()
    assert {name: len(stage.runs or ()) for name, stage in momentum_stages(model).items()} == {
        "blocks": 1
    }


@pytest.mark.parametrize("way", ["collect", "by index", "pool in between"])
def test_a_list_whose_loop_does_more_is_left_alone(way: str) -> None:
    with pytest.raises(UsageError, match="no two consecutive residual blocks"):
        momconv.convert(Loop(way), inputs=[torch.randn(3, 4)])


@pytest.mark.parametrize("name", ["resnet34", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_a_network_of_timms_is_converted(name: str) -> None:
    pytest.importorskip("timm")
    plain = own.make(f"timm:{name}", {"num_classes": 3})
    model = momconv.convert(plain, stages="all").train()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert any(stage.runs for stage in momentum_stages(model).values())
    assert describe(model).num_classes == 3


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError) as error:
        own.make("timm:resnet26")
    assert error.value.fix == "pip install timm"

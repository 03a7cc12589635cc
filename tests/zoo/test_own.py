"""Networks that somebody else wrote, by docs/own-network.md."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner, Result

import momconv
from momconv.cli import app
from momconv.errors import ModelFileError, UsageError
from momconv.momentum.sequential import momentum_stages
from momconv.zoo import own
from momconv.zoo.description import describe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "own-network.md"
MODULE, USE = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = "".join(re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL))
OPTIONS = "--network mine.py:make --arg depth=4 --arg width=8"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's module, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    path = tmp_path / "mine.py"
    path.write_text(MODULE, encoding="utf-8")
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, words)


def test_the_commands_of_the_page_work_and_none_runs_code_because_of_a_file(
    mine: Path, colours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine.with_name("photos").symlink_to(colours)
    lines = COMMANDS.splitlines()
    for line in lines:
        result = run(*shlex.split(line)[1:])
        assert result.exit_code == 0, result.output
    plain = momconv.load_network("mine.py:make", "plain.pth", {"depth": 4, "width": 8})
    assert describe(plain).num_classes == 3

    for path in mine.parent.glob("*plain*"):
        path.unlink()
    monkeypatch.setattr(own, "make", pytest.fail)
    without = [line.replace(OPTIONS, "").replace("-o run", "-o new") for line in lines]
    resuming = "momconv finetune --resume run --epochs 2"
    for line in (*(line for line in without if line not in lines), resuming):
        result = run(*shlex.split(line)[1:])
        assert result.exit_code == 2
        assert result.output.endswith(f"fix: {OPTIONS}\n")


def test_a_run_of_ones_own_network_goes_on_where_the_function_is_named_again(
    mine: Path, colours: Path
) -> None:
    words = ["--model", "mine.py:make", "--arg", "depth=4", "--resolution", "16"]
    begun = run("finetune", *words, "--data", str(colours), "--epochs", "1", "-o", "run")
    assert begun.exit_code == 0, begun.output
    options = ["--network", "mine.py:make", "--arg", "depth=4"]
    assert f"momconv eval run/best.safetensors --data {colours} {shlex.join(options)}" in " ".join(
        begun.output.split()
    )
    resumed = run("finetune", "--resume", "run", "--epochs", "2", *options)
    assert resumed.exit_code == 0, resumed.output
    loaded = momconv.load("run/last.safetensors", own.make("mine.py:make", {"depth": 4}))
    assert describe(loaded).classes == ("blue", "green", "red")


def test_a_file_does_not_fit_what_the_function_makes_with_other_arguments(mine: Path) -> None:
    model = momconv.convert(own.make("mine.py:make", {"depth": 4}, resolution=16))
    momconv.save(model, "mine.safetensors")
    with pytest.raises(ModelFileError, match="does not fit the network that was made") as error:
        momconv.load("mine.safetensors", own.make("mine.py:make"))
    assert error.value.fix is not None
    assert error.value.fix.endswith("--network mine.py:make --arg depth=4")


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
    plain = own.make(f"timm:{name}", {"num_classes": 3})
    model = momconv.convert(plain, stages="all").train()
    assert list(model.state_dict()) == list(plain.state_dict())
    assert any(stage.runs for stage in momentum_stages(model).values())
    assert describe(model).num_classes == 3
    side = 224 if name.startswith("vit") else 32
    images = torch.randn(2, 3, side, side)
    gradients = []
    for strategy in ("store", "momentum"):
        momconv.set_strategy(model, strategy)
        model.zero_grad()
        torch.manual_seed(0)
        model(images).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError) as error:
        own.make("timm:resnet26")
    assert error.value.fix == "pip install timm"

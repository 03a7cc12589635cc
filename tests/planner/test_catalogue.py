import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from momconv.cli import app
from momconv.planner import catalogue
from momconv.planner.catalogue import Entry, list_entries
from momconv.reports.inspection import show_models
from momconv.zoo.networks import names


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOMCONV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_network_is_predicted_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = list_entries(["cifar_resnet20"])
    assert (entry.resolution, entry.runs, entry.deepest) == (32, 3, 3)
    assert entry.parameters == 269_722
    assert 0.2 < entry.saved < 0.8
    monkeypatch.setattr(catalogue, "predict_entry", None)
    assert list_entries(["cifar_resnet20"]) == [entry]
    (file,) = cache.iterdir()
    file.write_text("{", encoding="utf-8")
    with pytest.raises(TypeError):  # the damaged file is not believed
        list_entries(["cifar_resnet20"])


def test_the_command_sorts_and_prints_json() -> None:
    words = ["models", "cifar_resnet20", "cifar_resnet3?", "--sort", "deepest", "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)["models"]
    assert [entry["name"] for entry in found] == ["cifar_resnet32", "cifar_resnet20"]
    table = CliRunner().invoke(app, ["models", "cifar_resnet20"]).stdout
    assert "cifar_resnet20" in table
    assert "0.3 M" in table
    assert CliRunner().invoke(app, ["models", "vgg*"]).exit_code == 2


def test_every_name_can_be_read_on_80_columns() -> None:
    large = Entry(
        name="",
        parameters=644_800_000,
        runs=12,
        deepest=200,
        resolution=518,
        store_bytes=3_700 * 2**20,
        auto_bytes=450 * 2**20,
        relative_seconds=1.5,
    )
    console = Console(width=80, file=io.StringIO())
    console.print(show_models(replace(large, name=name) for name in names()))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert [words[0] for words in lines[1:-1]] == [*names()]

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import catalogue as benchmark
from momconv import catalogue
from momconv.catalogue import read_catalogue
from momconv.cli import app
from momconv.reports.models import show_models
from momconv.zoo.networks import names


def test_the_table_has_every_network_in_order() -> None:
    assert [entry.name for entry in read_catalogue().entries] == [*names()]


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet50"])
def test_the_table_says_what_is_predicted(name: str) -> None:
    (known,) = (entry for entry in read_catalogue().entries if entry.name == name)
    now = benchmark.predict_entry(name)
    for figure in ("parameters", "resolution", "runs", "deepest"):
        assert getattr(known, figure) == getattr(now, figure)
    # Other versions of PyTorch may keep a little more or less.
    assert known.store_bytes == pytest.approx(now.store_bytes, rel=0.02)
    assert known.auto_bytes == pytest.approx(now.auto_bytes, rel=0.02)


def test_only_what_is_asked_for_is_predicted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[str]()
    (entry,) = (entry for entry in read_catalogue().entries if entry.name == "resnet18")
    document = {"predicted_by": {}, "images": 32, "models": []}
    table = tmp_path / "catalogue.json"
    table.write_text(json.dumps(document), encoding="utf-8")

    def predict(name: str) -> catalogue.Entry:
        asked.append(name)
        return entry

    monkeypatch.setattr(catalogue, "TABLE", table)
    monkeypatch.setattr(benchmark, "TABLE", table)
    monkeypatch.setattr(benchmark, "predict_entry", predict)
    monkeypatch.setattr(benchmark, "names", lambda: ("resnet18", "resnet34"))
    benchmark.main()
    benchmark.main(["resnet3*"])
    assert asked == ["resnet18", "resnet34", "resnet34"]
    assert read_catalogue().entries == (entry, entry)


def test_the_command_sorts_and_prints_json() -> None:
    words = ["models", "cifar_resnet20", "cifar_resnet3?", "--sort", "deepest", "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)["models"]
    assert [entry["name"] for entry in found] == ["cifar_resnet32", "cifar_resnet20"]
    table = CliRunner().invoke(app, ["models", "cifar_resnet20"]).stdout
    assert "cifar_resnet20" in table
    assert "0.3 M" in table
    assert CliRunner().invoke(app, ["models", "vgg*"]).exit_code == 2


@pytest.mark.parametrize(
    ("order", "key"),
    [("saved", lambda entry: entry["saved"]), ("store", lambda entry: entry["store_bytes"])],
)
def test_the_largest_comes_first(order: str, key: Callable[[dict[str, float]], float]) -> None:
    found = json.loads(CliRunner().invoke(app, ["models", "--sort", order, "--json"]).stdout)
    values = [key(entry) for entry in found["models"]]
    assert values == sorted(values, reverse=True)


def test_every_name_can_be_read_on_80_columns() -> None:
    table = read_catalogue()
    console = Console(width=80, file=io.StringIO())
    console.print(show_models(table, table.entries))
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert [words[0] for words in lines[1 : 1 + len(names())]] == [*names()]
    assert {"runs:", "deepest:", "saved:"} <= {word for words in lines for word in words}

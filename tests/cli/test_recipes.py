import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from momconv.cli import app
from momconv.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["recipes", *map(str, args)])


def test_every_recipe_of_the_repository_is_listed() -> None:
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    document = json.loads(run("ls", "--json").stdout)
    lines = run("ls").stdout.splitlines()

    assert "hymenoptera" in names
    assert list(document["recipes"]) == names
    assert document["recipes"]["hymenoptera"]["data"]["resolution"] == 500
    assert lines[0].split() == ["recipe", "network", "pixels", "γ", "batch", "memory"]
    assert [line.split()[0] for line in lines[1:]] == names


def test_a_recipe_is_shown_as_it_is() -> None:
    text = (ROOT / "recipes" / "hymenoptera.yaml").read_text(encoding="utf-8")
    assert run("show", "hymenoptera").stdout == text


def test_a_copy_is_the_same_and_says_what_to_do_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    ran = run("cp", "hymenoptera")

    assert load_recipe(Path("hymenoptera.yaml")).data.resolution == 500
    assert "next       momconv finetune --recipe hymenoptera.yaml --data FOLDER" in ran.stdout
    assert run("cp", "hymenoptera").exit_code == 2  # it is there
    assert run("cp", "hymenoptera", "--overwrite").exit_code == 0
    (tmp_path / "mine").mkdir()
    assert run("cp", "hymenoptera", "mine").exit_code == 0
    assert (tmp_path / "mine" / "hymenoptera.yaml").is_file()


def test_another_name_is_answered_with_the_closest_one(tmp_path: Path) -> None:
    ran = run("cp", "hymenopter", tmp_path / "x.yaml")
    assert ran.exit_code == 2
    assert "did you mean hymenoptera?" in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_wheel_has_every_package_and_the_recipes() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (ROOT / "momconv").rglob("*.py")}
    packages = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(settings["packages"]) == packages | {"momconv.recipes"}


def test_listing_does_not_import_torch() -> None:
    code = "import sys; from momconv.cli import app; app(['recipes', 'ls'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")

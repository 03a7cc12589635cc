import re
import tomllib
from pathlib import Path

import yaml

from momconv._version import __version__

ROOT = Path(__file__).parents[1]


def test_versions_agree() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert released[0] == __version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__


def test_the_readme_says_which_versions_are_supported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    wanted = dict(
        re.findall(
            r'"(torch|torchvision)>=([\d.]+)"', str(project["dependencies"]).replace("'", '"')
        )
    )
    python = project["requires-python"].removeprefix(">=")
    assert (
        f"Python {python} or newer, PyTorch {wanted['torch']} and torchvision "
        f"{wanted['torchvision']} or newer" in readme
    )


def test_each_data_file_of_the_package_is_in_a_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]
    packaged = {
        path
        for package, globs in patterns.items()
        if package != "momconv.recipes"
        for pattern in globs
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    files = {
        path
        for path in (ROOT / "momconv").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc", ".nbi", ".nbc")
    }
    assert packaged == files

"""Checks what ``make dist`` has built: ``python scripts/check_dist.py dist``.

Wheel and sdist must have all that a user needs in them, and the wheel must work, installed away
from the checkout.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

NEEDED = (
    "momconv/py.typed",
    "momconv/catalogue.json",
    "momconv/planner/gpus.json",
    "momconv/reports/page.html.j2",
)
RECIPES = ("hymenoptera.yaml", "three-gib.yaml")


def check(folder: Path) -> None:
    """Do nothing if one wheel and one sdist are in ``folder``, and both are whole."""
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    (licence,) = (name for name in names if name.endswith("LICENSE"))
    _require(wheel, names, [*NEEDED, licence, *(f"momconv/recipes/{name}" for name in RECIPES)])
    with tarfile.open(sdist) as archive_:
        names = {name.partition("/")[2] for name in archive_.getnames()}
    recipes = [f"recipes/{name}" for name in RECIPES]
    _require(sdist, names, [*NEEDED, "LICENSE", "README.md", "pyproject.toml", *recipes])
    _try_out(wheel)


def _require(archive: Path, names: set[str], needed: list[str]) -> None:
    if missing := [name for name in needed if name not in names]:
        sys.exit(f"{archive} lacks {', '.join(missing)}")


def _try_out(wheel: Path) -> None:
    """Install the wheel alone into a folder, and run it from another."""
    with tempfile.TemporaryDirectory() as place:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place]
        subprocess.run([*pip, str(wheel)], check=True)
        env = os.environ | {"PYTHONPATH": place}
        code = "import momconv; print(momconv.__version__, momconv.__file__)"
        found = _run(["-c", code], env)
        version, file = found.split()
        if not file.startswith(place) or f"-{version}-" not in wheel.name:
            sys.exit(f"{wheel} is not what was imported: momconv {version} in {file}")
        shown = _run(["-m", "momconv", "recipes", "show", "hymenoptera"], env)
        listed = _run(["-m", "momconv", "models", "resnet50"], env)
        if "model:" not in shown or "resnet50" not in listed:
            sys.exit(f"{wheel} does not work")
        print(f"momconv {version}: {wheel.name} works")  # noqa: T201


def _run(words: list[str], env: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, *words],
        env=env,
        cwd=env["PYTHONPATH"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout


if __name__ == "__main__":
    check(Path(sys.argv[1]))

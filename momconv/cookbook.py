"""The recipes that come with momconv.

In a checkout, and where that is installed editable, they are in ``recipes`` beside the package; a
wheel has them in it.
"""

import difflib
from pathlib import Path

from momconv.errors import UsageError
from momconv.words import quoted

_PACKAGE = Path(__file__).parent
_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parent / "recipes")


def list_recipes() -> dict[str, Path]:
    """Return the file of each recipe by its name, in alphabetical order."""
    folder = next(folder for folder in _FOLDERS if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the file of the recipe ``name``.

    Raises:
        UsageError: There is none of that name.
    """
    recipes = list_recipes()
    if name in recipes:
        return recipes[name]
    close = difflib.get_close_matches(name, recipes, n=1)
    hint = f" — did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"no recipe {quoted(name)} comes with momconv{hint}",
        kind="usage.no_recipe",
        fix=f"one of {', '.join(recipes)}",
    )


def locate_recipe(path: Path) -> Path:
    """Return the file of a recipe: ``path``, that of the run in it, or what comes along so called.

    A file stands before a recipe of the same name, and this one before a folder.

    Raises:
        UsageError: A mere name is of none of them.
    """
    if path.is_file() or (len(path.parts) > 1 and not path.is_dir()):
        return path
    inside = path / "config.yaml"
    if str(path) not in list_recipes() and (path.is_dir() or path.suffix):
        return inside if inside.is_file() else path
    return find_recipe(str(path))

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

"""``momconv recipes``."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from momconv.cli._console import guarded, out, print_json
from momconv.cli._group import Commands
from momconv.cli._options import JsonOption, OverwriteOption
from momconv.cookbook import find_recipe, list_recipes
from momconv.files.atomic import require_free, write_text
from momconv.recipe import load_recipe

app = typer.Typer(cls=Commands, no_args_is_help=True, help="The recipes that come with momconv.")

_Name = Annotated[str, typer.Argument(metavar="NAME", help="As momconv recipes ls shows it.")]


def ls(
    *,
    json_output: JsonOption = False,
) -> None:
    """List the recipes."""
    recipes = {name: load_recipe(path) for name, path in list_recipes().items()}
    if json_output:
        documents = {name: recipe.model_dump(mode="json") for name, recipe in recipes.items()}
        print_json({"ok": True, "recipes": documents})
        return
    table = Table("recipe", "network", box=None, pad_edge=False)
    for title in ("pixels", "γ", "batch", "memory"):
        table.add_column(title, justify="right")
    for name, recipe in recipes.items():
        pixels, train = recipe.data.resolution, recipe.train
        figures = (f"{recipe.momentum.gamma:g}", str(train.batch_size), train.memory or "")
        table.add_row(name, recipe.model.name, str(pixels or ""), *figures)
    out.print(table)


def show(*, name: _Name) -> None:
    """Print a recipe; its head says how to use it."""
    typer.echo(find_recipe(name).read_text(encoding="utf-8"), nl=False)


def cp(
    *,
    name: _Name,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="The copy.", show_default="NAME.yaml"),
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Copy a recipe, to change it."""
    source = find_recipe(name)
    path = file or Path(source.name)
    if path.is_dir():
        path /= source.name
    require_free(path, overwrite=overwrite)
    write_text(path, source.read_text(encoding="utf-8"))
    command = f"momconv finetune --recipe {shlex.quote(str(path))} --data FOLDER"
    for label, value in {"written": path, "next": command}.items():
        out.print(Text(f"{label:<11}{value}"), soft_wrap=True)


app.command("ls")(guarded(ls))
app.command("show")(guarded(show))
app.command("cp")(guarded(cp))

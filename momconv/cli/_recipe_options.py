"""The options of ``momconv finetune`` that set a key of the recipe, as its fields describe them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from momconv.recipe import PANELS, SECTIONS, Option

RUN = PANELS[-1]
# By the section and the name of what they set, but with the folder of images first.
_ORDER = ("data", "model", "train", "momentum", "log")


def find_options() -> dict[str, Option]:
    """Return the option that sets each key, of those that have one, in the order of the help."""
    found = {
        f"{section}.{name}": option
        for section in _ORDER
        for name, field in SECTIONS[section].model_fields.items()
        for option in field.metadata
        if isinstance(option, Option)
    }
    return dict(sorted(found.items(), key=lambda item: PANELS.index(item[1].panel)))


def with_recipe_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return ``command``, which takes any keyword, with an option for each key that has one."""
    options = [
        inspect.Parameter(
            to_parameter(key),
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=_annotate(option, _find_field(key)),
        )
        for key, option in find_options().items()
    ]
    signature = inspect.signature(command)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    context = own.pop(0)
    command.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[context, *options, *own]
    )
    return command


def read_options(given: Mapping[str, Any]) -> dict[str, object]:
    """Return the values that were ``given`` to such a command, by the keys that they set."""
    values = ((key, given[to_parameter(key)]) for key in find_options())
    unset: tuple[object, ...] = (None, (), [])
    return {key: value for key, value in values if value not in unset}


def to_parameter(key: str) -> str:
    """Return the name in the program of the option that sets ``key``."""
    return key.replace(".", "__")


def _find_field(key: str) -> FieldInfo:
    section, _, name = key.partition(".")
    return SECTIONS[section].model_fields[name]


def _annotate(option: Option, field: FieldInfo) -> Any:
    """Return the type of an option whose text pydantic reads, with what Typer shows of it."""
    is_list = isinstance(field.default, list)
    kind = bool if field.annotation is bool else list[str] if is_list else str
    default = "yes" if field.default is True else field.default
    shown = typer.Option(
        *option.flags.split(),
        metavar=option.metavar or None,
        help=option.help.format(default),
        rich_help_panel=option.panel or None,
        show_default=False,
    )
    return Annotated[kind | None, shown]

from itertools import zip_longest
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from momconv.cli import app
from momconv.cli._recipe_options import find_options, to_parameter
from momconv.recipe import KEYS, PANELS, SECTIONS

README = Path(__file__).resolve().parents[2] / "recipes" / "README.md"


def find_rows() -> dict[str, tuple[str, str]]:
    """The default and the description of each key in the tables of the README."""
    rows: dict[str, tuple[str, str]] = {}
    for line in README.read_text(encoding="utf-8").splitlines():
        if not line.startswith("| `"):
            continue
        names, defaults, text = line.strip("| ").split(" | ", 2)
        keys = [name.strip("`") for name in names.split(", ")]
        shown = defaults.split(", ") if len(keys) > 1 else [defaults]
        rows |= {
            key: (default, text) for key, default in zip_longest(keys, shown, fillvalue=shown[0])
        }
    return rows


def default(key: str) -> object:
    section, name = key.split(".")
    return SECTIONS[section].model_fields[name].default


@pytest.mark.parametrize("key", KEYS)
def test_the_readme_tells_the_default_and_the_option_of_a_key(key: str) -> None:
    shown, text = find_rows()[key]
    if default(key) is not None:  # else the README says what it comes to
        assert yaml.safe_load(shown.replace("1e-4", "1.0e-4")) == default(key)
    if option := find_options().get(key):
        flags = option.flags.split()[0].split("/")
        assert any(f"`{flag}" in text for flag in flags)


def test_each_option_is_one_of_the_command_and_no_two_share_a_flag() -> None:
    command = get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    given = {param.name: param for param in command.params}
    flags = [flag for param in command.params for flag in (*param.opts, *param.secondary_opts)]
    assert len(flags) == len(set(flags))
    for key, option in find_options().items():
        param = given[to_parameter(key)]
        assert [*param.opts, *param.secondary_opts] == option.flags.replace("/", " ").split()
        assert param.help
        assert "{}" not in param.help
        assert option.panel in PANELS

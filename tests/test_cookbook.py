from pathlib import Path

import pytest

from momconv.cookbook import list_recipes, locate_recipe
from momconv.errors import UsageError


def test_a_name_is_a_recipe_that_comes_along_also_beside_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known, name = list_recipes()["hymenoptera"], Path("hymenoptera")
    assert locate_recipe(name) == known
    name.mkdir()
    (name / "config.yaml").touch()
    assert locate_recipe(name) == known
    assert locate_recipe(tmp_path / name) == tmp_path / name / "config.yaml"
    (name / "config.yaml").unlink()
    name.rmdir()
    name.touch()  # a file of the user's own, whatever it is called
    assert locate_recipe(name) == name


def test_a_name_of_nothing_is_answered_with_the_closest_one() -> None:
    with pytest.raises(UsageError, match="did you mean hymenoptera"):
        locate_recipe(Path("hymenopter"))


def test_a_path_is_left_to_who_reads_it(tmp_path: Path) -> None:
    for path in (tmp_path / "none", Path("none.yaml")):
        assert locate_recipe(path) == path

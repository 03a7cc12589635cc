import inspect
import re

import pytest

from momconv import errors
from momconv.errors import DataError, MomconvError

CLASSES = {
    name: cls
    for name, cls in inspect.getmembers(errors, inspect.isclass)
    if issubclass(cls, MomconvError)
}
EXIT_CODES = {
    "MomconvError": 1,
    "UsageError": 2,
    "DataError": 3,
    "ModelFileError": 4,
    "ResourceError": 5,
    "OutOfMemory": 5,
    "ThresholdNotMet": 6,
    "InversionError": 1,
    "RangeOverflow": 1,
    "NotReproducible": 1,
}


def test_exit_codes_are_a_promise_to_scripts() -> None:
    assert {name: cls.exit_code for name, cls in CLASSES.items()} == EXIT_CODES


def test_the_tree_that_is_drawn_is_the_tree_that_is_there() -> None:
    drawn = re.findall(r"(?:── |^ {4})([A-Z]\w+)", errors.__doc__ or "", flags=re.MULTILINE)
    assert sorted(drawn) == sorted(CLASSES)


@pytest.mark.parametrize("cls", CLASSES.values())
def test_an_error_carries_what_a_script_and_a_person_need(cls: type[MomconvError]) -> None:
    error = cls("no such thing: x", kind="a.kind", fix="try y")
    assert (error.message, error.kind, error.fix) == ("no such thing: x", "a.kind", "try y")
    assert str(error) == "no such thing: x\nfix: try y"


def test_an_error_without_a_fix_does_not_promise_one() -> None:
    assert str(DataError("empty", kind="a.kind")) == "empty"

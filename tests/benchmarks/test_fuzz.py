from pathlib import Path

import pytest
from hypothesis import strategies as st

from benchmarks.fuzz import FAILED, Target, fuzz, make_targets, try_input
from momconv.errors import MomconvError

TITLES = ["metadata", "model", "state", "checkpoint", "recipe", "split", "table", "image"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("title", TITLES)
def test_a_stranger_s_file_is_read_or_refused_by_name(
    targets: dict[str, Target], tmp_path: Path, title: str
) -> None:
    inputs = 200 if title == "split" else 15  # of whose changes hardly any is accepted
    kinds = fuzz(targets[title], inputs, tmp_path / "input")
    assert kinds[FAILED] == 0
    assert len(kinds) > 1


def test_all_parsers_are_tested(targets: dict[str, Target]) -> None:
    assert list(targets) == TITLES


def refuse(message: str, error: type[Exception]) -> Target:
    """A parser that refuses what has an x with ``message`` and anything else that has a y."""

    def parse(path: Path) -> None:
        text = path.read_text()
        if "x" in text:
            raise MomconvError(message, kind="named")
        if "y" in text:
            raise error

    return Target(parse, st.text("xyz", min_size=1).map(str.encode))


def test_a_failure_shrinks_to_the_least_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = fuzz(refuse("no", IndexError), 100, tmp_path / "input")
    assert kinds[FAILED] == 1
    assert (tmp_path / "input").read_bytes() == b"y"
    printed = capsys.readouterr().out
    assert printed.startswith("b'y'\n")
    assert "IndexError" in printed


def test_what_a_parser_must_not_do_is_found(tmp_path: Path) -> None:
    def overwrite(path: Path) -> None:
        path.write_bytes(b"changed")

    assert try_input(refuse("no", IndexError), b"x", tmp_path / "input") == "named"
    with pytest.raises(AssertionError, match="was changed"):
        try_input(Target(overwrite, st.binary()), b"data", tmp_path / "input")
    with pytest.raises(MemoryError):
        try_input(refuse("no", MemoryError), b"y", tmp_path / "input")

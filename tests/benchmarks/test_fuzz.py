from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz import Target, make_input, make_targets, try_input
from momconv.errors import MomconvError

TITLES = ["metadata", "model", "state", "checkpoint", "recipe", "split", "image"]


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_targets(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("title", TITLES)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(number=st.integers(0, 10**9))
def test_a_damaged_file_is_read_or_refused_by_name(
    targets: dict[str, Target], tmp_path: Path, title: str, number: int
) -> None:
    target = targets[title]
    assert try_input(target, make_input(target, number), tmp_path / "input")


def test_all_parsers_are_tested(targets: dict[str, Target]) -> None:
    assert list(targets) == TITLES


def test_sound_files_are_accepted(targets: dict[str, Target], tmp_path: Path) -> None:
    for title in ("model", "state", "checkpoint", "recipe", "image"):
        for seed in targets[title].seeds:
            assert try_input(targets[title], seed, tmp_path / "input") == "accepted"


def test_a_parser_that_crashes_would_be_found(tmp_path: Path) -> None:
    def parse(path: Path) -> None:
        if not path.read_bytes():
            raise MomconvError("empty", kind="named")
        raise IndexError

    assert try_input(Target(parse, []), b"", tmp_path / "input") == "named"
    with pytest.raises(IndexError):
        try_input(Target(parse, []), b"x", tmp_path / "input")

from pathlib import Path

import pytest

from momconv.files.cache import cache_folder

HOME = Path("~/.cache/momconv").expanduser()


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/own", "/shared", Path("/own")),
        ("", "/shared", Path("/shared/momconv")),
        ("", "", HOME),
        ("", "not/absolute", HOME),
    ],
)
def test_the_cache_lies_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, own: str, shared: str, expected: Path
) -> None:
    monkeypatch.setenv("MOMCONV_CACHE", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    assert cache_folder() == expected

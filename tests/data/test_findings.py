import hashlib
from pathlib import Path

import pytest

from momconv.data.findings import Finding, Findings
from momconv.data.values import Values


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


FOUND = {
    "a/1.jpg": Finding(digest("1"), None, "JPEG RGB", (3, 4)),
    "a/2.jpg": Finding(digest("2"), None, "JPEG CMYK", (5, 6), ("CMYK",)),
    "b/3.tif": Finding(digest("3"), None, "TIFF F", (7, 8), (), Values("floats", 2, (0.5, 1.0))),
    "b/4.jpg": Finding("", "No such file or directory"),
    "b/5.jpg": Finding(digest("5"), None, "JPEG RGB", (9, 10)),
}


@pytest.fixture
def findings() -> Findings:
    return Findings.collect(FOUND.items())


def test_what_is_put_into_columns_comes_out_of_them(findings: Findings) -> None:
    assert {str(path): finding for path, finding in findings.items()} == FOUND
    assert [findings.sha256(Path(name)) for name in FOUND] == [f.sha256 for f in FOUND.values()]
    assert len(findings.kinds) == 4
    with pytest.raises(KeyError):
        findings[Path("c")]


def test_a_selection_has_its_order_and_only_its_kinds(findings: Findings) -> None:
    selected = findings.select(["b/5.jpg", "a/1.jpg"])
    assert [*selected.items()] == [(Path(n), FOUND[n]) for n in ("b/5.jpg", "a/1.jpg")]
    assert selected.count_kinds() == [(Finding("", None, "JPEG RGB"), 2)]


def test_of_what_two_found_the_first_counts(findings: Findings) -> None:
    some = findings.select(["a/2.jpg", "b/4.jpg"])
    other = Findings.collect([("b/4.jpg", FOUND["a/1.jpg"]), ("c", FOUND["a/2.jpg"])])
    both = {Path(name): FOUND[name] for name in ("a/2.jpg", "b/4.jpg")}
    assert some | other == both | {Path("c"): FOUND["a/2.jpg"]}
    assert len((some | other).kinds) == 2


def test_rare_kinds_are_found(findings: Findings) -> None:
    assert findings.where(lambda kind: kind.problem) == {Path("b/4.jpg"): FOUND["b/4.jpg"]}
    assert findings.where(lambda kind: kind.values) == {Path("b/3.tif"): FOUND["b/3.tif"]}
    assert not Findings.collect(()).where(lambda _: True)

"""What the pages point at is there."""

import re
from pathlib import Path

import pytest

from momconv.vocabulary import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/*.md")])
CODE = "\n".join(path.read_text("utf-8") for path in ROOT.glob("momconv/**/*.py"))
OTHERS = {"nn", "torch", "Sequential", *STRATEGIES}  # PyTorch's, and words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text("utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_what_the_way_of_a_backward_step_names_is_defined() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "docs/how-it-works.md").read_text("utf-8"), flags=re.S)
    names = re.findall(r"`([A-Za-z_.]+)`", text)
    own = {n.split(".")[-1] for n in names if n.split(".")[0] not in OTHERS}
    unknown = {n for n in own if not re.search(rf"(def|class) {n}\b", CODE)}
    assert unknown == set()

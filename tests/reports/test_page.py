from pathlib import Path

import pytest
from pages import PageReader
from PIL import Image

from momconv.reports.page import Figure, Illustration, Page, Section, Table, embed, render, shrink

HOSTILE = "<script>alert(1)</script>'\"&amp;{{ 7 * 7 }}\x1b[31m\udce4"
SHOWN = HOSTILE.replace("\x1b", r"\x1b").replace("\udce4", r"\xe4")


def make_page(text: str, picture: Path) -> Page:
    image = Image.new("RGBA", (900, 30), "red")
    image.save(picture)
    section = Section(
        title=text,
        lines=(text,),
        pictures=(embed(picture, text),),
        thumbnails=(shrink(image, text, (text,)),),
        tables=(Table((text, text), ((text, text),)), Table((), ((text, text),))),
        summary=text,
        details=(Table((text,), ((text,),)),),
        commands=(text,),
    )
    return Page(text, text, (Figure(text, text, text),), (section,))


def test_nothing_that_is_said_is_obeyed(tmp_path: Path) -> None:
    page = render(make_page(HOSTILE, tmp_path / "picture.png"))
    found = PageReader(page)
    assert "script" not in found.elements
    assert found.pictures == 2
    # The page's title, twice, and what is below it; a figure; in the section its title, a line, a
    # thumbnail, both tables, what is folded, and a command.
    assert found.text.count(SHOWN) == 3 + 3 + 1 + 1 + 2 + 6 + 3 + 1
    page.encode()  # has no lone surrogate


def test_a_page_looks_right_in_light_and_dark_and_on_a_phone(tmp_path: Path) -> None:
    page = render(make_page("x", tmp_path / "picture.png"))
    assert page.startswith("<!DOCTYPE html>")
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport" content="width=device-width' in page


@pytest.mark.parametrize("size", [(1, 40_000), (4000, 3000), (8, 8)])
def test_a_thumbnail_is_small(size: tuple[int, int]) -> None:
    thumbnail = shrink(Image.new("RGB", size), "")
    assert isinstance(thumbnail, Illustration)
    assert len(thumbnail.uri) < 20_000

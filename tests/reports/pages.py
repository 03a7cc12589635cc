"""Reading the pages that reports are."""

from html.parser import HTMLParser

_VOID = {"meta", "img", "br"}  # elements without an end
_ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "background"}


class PageReader(HTMLParser):
    """Reads a page, which must be well-formed and refer to nothing outside of it."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[str] = []
        self.words: list[str] = []  # the text
        self.pictures = 0
        self.elements: set[str] = set()
        self.feed(page)
        self.close()
        assert not self._open

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            if name in _ADDRESSES:
                assert value is not None
                assert value.startswith(("data:image/png;base64,", "data:image/jpeg;base64,"))
        self.pictures += tag == "img"
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        else:
            self.words.append(data)

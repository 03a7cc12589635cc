import json
from pathlib import Path

import pytest
from pydantic import BaseModel

from momconv.names import NamedPath, decode_name, encode_name
from momconv.words import printable


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("photo.png", "photo.png"),
        ("lärche\\.png", "lärche\\.png"),
        ("l\udce4rche", "l\\xe4rche"),
        ("a\\xe4b", "a\\x5cxe4b"),
        ("\\\udcff\\x5c", "\\\\xff\\x5cx5c"),
    ],
)
def test_any_name_can_be_written_and_read_again(name: str, text: str) -> None:
    assert encode_name(name) == text
    assert decode_name(text) == name
    assert text.encode()


def test_people_see_the_same() -> None:
    assert printable("l\udce4rche\n") == "l\\xe4rche\\n"


def test_pydantic_writes_and_reads_them() -> None:
    class Document(BaseModel):
        path: NamedPath | None

    document = Document(path=Path("l\udce4rche"))
    text = document.model_dump_json()
    assert json.loads(text) == {"path": "l\\xe4rche"}
    assert Document.model_validate_json(text) == document
    assert Document(path=None).model_dump_json() == '{"path":null}'

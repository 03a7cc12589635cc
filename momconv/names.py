r"""Names of files and folders as text, also where they are not UTF-8.

Python reads a byte that is no UTF-8 as a lone surrogate, which cannot be written. In everything
that momconv writes it stands as ``\xe4``; so that names can be read again, ``\x5c`` stands for the
backslash of a name that has such a thing in it.
"""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import PlainSerializer, PlainValidator, WithJsonSchema

_BYTE = re.compile(r"\\x([0-9a-f]{2})")
_FIRST, _LAST = "\udc80", "\udcff"  # what the bytes 80 and FF are read as
_OFFSET = 0xDC00


def encode_name(name: str | Path) -> str:
    r"""Return ``name`` in characters that can be written.

    >>> print(encode_name("l\udce4rche.png"), encode_name("lärche.png"))
    l\xe4rche.png lärche.png
    """
    text = str(name)
    if text.isascii() and "\\" not in text:  # as most are, of which there may be millions
        return text
    text = _BYTE.sub(lambda match: rf"\x5c{match[0][1:]}", text)
    return "".join(show_byte(char) if _FIRST <= char <= _LAST else char for char in text)


def decode_name(text: str) -> str:
    r"""Return the inverse of ``encode_name``.

    >>> decode_name(encode_name("l\udce4rche")) == "l\udce4rche"
    True
    """
    return _BYTE.sub(lambda match: _to_char(int(match[1], 16)), text) if "\\x" in text else text


def name_below(path: Path, root: Path) -> str:
    """Return how ``path`` is called from ``root``, in characters that can be written.

    >>> name_below(Path("photos/cat/1.jpg"), Path("photos")), name_below(Path("a"), Path("b"))
    ('cat/1.jpg', '../a')
    """
    text, start = str(path), f"{root}{os.sep}"
    is_below = text.startswith(start)  # as nearly all are, of which there may be millions
    return encode_name(text[len(start) :] if is_below else os.path.relpath(path, root))


def show_byte(char: str) -> str:
    """Return the byte that was read as ``char``, written out."""
    return f"\\x{ord(char) - _OFFSET:02x}" if _FIRST <= char <= _LAST else char


def _to_char(byte: int) -> str:
    return chr(byte if byte < 0x80 else byte + _OFFSET)


def _to_path(value: object) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("not a path")
    return Path(decode_name(str(value)))


# A path in a file that is written and read by pydantic.
NamedPath = Annotated[
    Path,
    PlainValidator(_to_path),
    PlainSerializer(encode_name),
    WithJsonSchema({"type": "string", "format": "path"}),
]

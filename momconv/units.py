"""Bytes, durations, shares and paths, as people write and read them."""

import os
import re
from pathlib import Path

from momconv.errors import UsageError
from momconv.words import quoted

_UNITS = {"": 1, "B": 1}
_UNITS |= {f"{p}iB": 2 ** (10 * n) for n, p in enumerate("KMGT", 1)}
_UNITS |= {f"{p}B": 10 ** (3 * n) for n, p in enumerate("KMGT", 1)}
_UNITS |= {p: 2 ** (10 * n) for n, p in enumerate("KMGT", 1)}
_MOST = 2.0**60  # bytes or seconds, which is more than anyone has
_SECONDS = {"s": 1, "min": 60, "m": 60, "h": 3600}
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in _UNITS.items()}


def parse_bytes(text: str, option: str = "") -> int:
    """Return the number of bytes in ``text``, which may be the value of an ``option``.

    >>> parse_bytes("3GiB"), parse_bytes("1.5 GB"), parse_bytes("512M"), parse_bytes("7")
    (3221225472, 1500000000, 536870912, 7)

    Raises:
        UsageError: ``text`` is not a positive amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    factor = _BY_LOWER_CASE.get(match[2].lower()) if match else None
    if not match or factor is None or not 0 < float(match[1]) * factor < _MOST:
        raise UsageError(
            f"{quoted(text)} is not an amount of memory",
            kind="usage.bad_value",
            fix=f"{option} 3GiB".lstrip(),
        )
    return int(float(match[1]) * factor)


def format_bytes(count: float) -> str:
    """Return ``count`` bytes in the largest binary unit that leaves a number of at least 1.

    >>> format_bytes(3 * 2**30), format_bytes(1536), format_bytes(12)
    ('3.0 GiB', '1.5 KiB', '12 B')
    """
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(count) >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count:.0f} B"


def format_duration(seconds: float) -> str:
    """Return ``seconds`` in at most two units.

    >>> format_duration(0.0042), format_duration(0.42), format_duration(75), format_duration(7260)
    ('4.2 ms', '0.4 s', '1 min 15 s', '2 h 1 min')
    """
    if 0 < seconds < 0.05:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def parse_duration(text: str, option: str = "") -> float:
    """Return the seconds in ``text``, which may be the value of an ``option``.

    >>> parse_duration("5min"), parse_duration("1.5 h"), parse_duration("30s")
    (300.0, 5400.0, 30.0)

    Raises:
        UsageError: ``text`` is not a duration with a unit.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-z]+)\s*", text)
    unit = _SECONDS.get(match[2]) if match else None
    if not match or unit is None or not 0 < float(match[1]) * unit < _MOST:
        raise UsageError(
            f"{quoted(text)} is not a duration",
            kind="usage.bad_value",
            fix=f"{option} 5min".lstrip(),
        )
    return float(match[1]) * unit


def parse_share(text: str, option: str = "") -> float:
    """Return the fraction that ``text`` says, which may be the value of an ``option``.

    >>> parse_share("1%"), parse_share("0.05"), parse_share("2.5 %")
    (0.01, 0.05, 0.025)

    Raises:
        UsageError: ``text`` is not a share between 0 and 1.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    number = float(match[1]) if match else -1
    share = number / (100 if match and match[2] else 1)
    if not 0 <= share <= 1:
        meant = f"{text.strip()}%" if 1 < number <= 100 else "1%"
        raise UsageError(
            f"{quoted(text)} is not a share between 0% and 100%",
            kind="usage.bad_value",
            fix=f"{option} {meant}".lstrip(),
        )
    return share


_LONGEST_PATH, _LONGEST_NAME = 4096, 255  # bytes, on Linux


def parse_path(text: str | Path) -> Path:
    """Return the path in ``text``, where ``~`` is the home folder.

    Raises:
        UsageError: No file can have that name.
    """
    path = Path(os.path.expanduser(text))
    try:
        name = os.fsencode(path)
    except UnicodeEncodeError:
        name = b"\0"
    longest = max(map(len, name.split(b"/")))
    if b"\0" in name or len(name) >= _LONGEST_PATH or longest > _LONGEST_NAME:
        raise UsageError(f"{quoted(str(text))} is not a path", kind="usage.bad_path")
    return path

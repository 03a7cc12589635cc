"""Where momconv keeps what it could find out again."""

import os
from pathlib import Path

from momconv.units import parse_path


def cache_folder() -> Path:
    """``$MOMCONV_CACHE``, or ``momconv`` where the machine keeps caches; it may not exist."""
    if own := os.environ.get("MOMCONV_CACHE"):
        return parse_path(own)
    shared = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    # The specification of XDG has relative paths ignored.
    return (shared if shared.is_absolute() else Path("~/.cache").expanduser()) / "momconv"

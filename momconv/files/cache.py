"""Where momconv keeps what it could find out again."""

import os
from pathlib import Path

from platformdirs import user_cache_path

from momconv.units import parse_path


def cache_folder() -> Path:
    """Return ``$MOMCONV_CACHE``, or ``momconv`` where this machine keeps caches."""
    if own := os.environ.get("MOMCONV_CACHE"):
        return parse_path(own)
    return user_cache_path("momconv", appauthor=False)

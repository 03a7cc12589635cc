"""Whether anything may be downloaded."""

import os


def is_offline() -> bool:
    """Return whether the environment says ``MOMCONV_OFFLINE=1``, as ``momconv --offline`` does."""
    return os.environ.get("MOMCONV_OFFLINE", "0") not in ("", "0")

"""Whether anything may be downloaded, and whether again."""

import os


def is_offline() -> bool:
    """Return whether the environment says ``MOMCONV_OFFLINE=1``, as ``momconv --offline`` does."""
    return os.environ.get("MOMCONV_OFFLINE", "0") not in ("", "0")


def is_refetching() -> bool:
    """Return whether ``MOMCONV_REFETCH=1`` asks for damaged weights anew, as ``--refetch`` does."""
    return os.environ.get("MOMCONV_REFETCH", "0") not in ("", "0")

"""The memory of this machine."""

from __future__ import annotations

import os


def main_memory() -> int:
    """Return the bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0

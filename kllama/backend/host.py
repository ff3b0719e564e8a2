"""The machine that the frameworks run on, as far as the operating system tells."""

import os


def host_memory() -> int | None:
    """Give how many bytes of memory the machine has, or None where the system has no `sysconf` (Windows)."""
    if not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

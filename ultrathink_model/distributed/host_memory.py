"""What the process does with memory that it freed."""

import ctypes
import logging
import sys

# From glibc's malloc.h: what is free at the end of the heap before it goes back to the system, and the size from
# which an allocation gets pages of its own, which go back as soon as it is freed.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
LARGEST = (1 << 31) - 1

logger = logging.getLogger(__name__)


def keep_freed_memory() -> bool:
    """Has the process keep freed memory for its next allocations, where the C library is glibc.

    A training step frees what the next one asks for again. By default glibc hands most of it back in between, and
    the system clears every page anew at its first touch: about a twentieth of the time of a step on a CPU.

    Returns:
        Whether it could be had.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    kept = mallopt is not None and bool(mallopt(TRIM_THRESHOLD, LARGEST)) and bool(mallopt(MMAP_THRESHOLD, LARGEST))
    if not kept:
        logger.debug("this C library does not keep freed memory when it is asked to")
    return kept

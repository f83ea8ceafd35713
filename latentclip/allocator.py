"""glibc's allocator for arithmetic on a CPU, as environment variables: it must know before a program starts.

Unless told otherwise it gives large blocks back to the kernel at each free, and half of a training step on a CPU was
page faults. Nothing here matters where the arithmetic is on an accelerator.
"""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
}


def restart_with_it() -> None:
    """Start this program again from its beginning, with the variables set where the user has not set them."""
    if missing := {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}:
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})

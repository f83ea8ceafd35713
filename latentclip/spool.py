"""Files without a name: what is too large for memory lies on the disk of TMPDIR, and is gone with its process.

spool = Spool()
spool.append(latents)                   # (n, c, h, w), as often as there are batches
spool.array(np.dtype("<f2"), (4, 64, 64))  # all of them, mapped from the file
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


class Spool:
    """A growing file without a name. A full disk is an OSError that names the temporary folder."""

    closed = False
    """A spool is a file to Arrow and to tarfile, as far as they write from its beginning to its end."""

    def __init__(self) -> None:
        with _named(), tempfile.TemporaryFile() as file:
            self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)
        self._size = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        left = memoryview(data).cast("B")
        with _named():
            while left:
                left = left[os.write(self._descriptor, left) :]
        self._size += len(data)
        return len(data)

    def append(self, values: np.ndarray) -> None:
        """Append the bytes of an array in C order."""
        self.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def bytes(self) -> memoryview:
        """All that was written so far, mapped; the pages are the kernel's to drop."""
        if not self._size:
            return memoryview(b"")
        return memoryview(mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_READ))

    def array(self, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """What was appended as one array (n, *shape), mapped and read-only."""
        return np.frombuffer(self.bytes(), dtype).reshape(-1, *shape)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing is buffered."""

    def close(self) -> None:
        """The file ends with the spool, whoever has written into it."""


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, tempfile.gettempdir()) from error

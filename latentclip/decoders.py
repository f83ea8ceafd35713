"""Decoder processes: untrusted images become pixels where a hostile one can kill nothing but its own decoder.

    with DecoderPool(Preparation(image_size=512), size=4) as decoders:
        pixels, geometry = decoders.prepare("key", image_bytes)

Threads may share a pool; each call has one process to itself. The processes end with the process that made the pool,
however it ends, and leave neither files nor shared-memory segments behind.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import queue
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from latentclip._decoder_process import MEMORY_LIMIT, TIME_SIGNAL, Preparation, Prepared
from latentclip.geometry import Geometry
from latentclip.rejects import Reason, Rejected

__all__ = ["ATTEMPTS", "MEMORY_LIMIT", "DecoderPool", "Preparation", "Prepared"]

ATTEMPTS = 3
"""Decoders that one image may cost before it is refused: a lost one may be the machine's fault, three are its own."""
SILENCE_SECONDS = 120
"""Time on the clock after which a decoder that does not answer counts as lost."""
_WITHHELD = ("MALLOC_", "AWS_", "GOOGLE_", "AZURE_", "FSSPEC_", "HF_")
"""Beginnings of environment variables that decoders do not get."""


class DecoderDied(Exception):  # noqa: N818 - what happened to it
    """A decoder ended, or went silent, over an image."""

    def __init__(self, too_slow: bool) -> None:
        super().__init__()
        self.too_slow = too_slow


class DecodersUnavailable(RuntimeError):  # noqa: N818 - what they are
    """No decoder process can be started on this machine; no fault of any image."""


class Decoder:
    """One decoder process with a socket for images, and shared memory for pixels."""

    def __init__(self, preparation: Preparation) -> None:
        """Start the process, which gets ready in the background."""
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SILENCE_SECONDS, 0))
        held, self._lifeline = os.pipe()
        memory = os.memfd_create("latentclip-decoder")
        os.ftruncate(memory, preparation.largest)
        self._pixels = np.frombuffer(mmap.mmap(memory, preparation.largest), np.uint8)
        self._views = preparation.views
        descriptors = (theirs.fileno(), memory, held)
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    f"import {__package__}._decoder_process as it; it.main()",
                    *map(str, descriptors),
                ],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                env=_environment(),
            )
        finally:
            for descriptor in (theirs.detach(), memory, held):
                os.close(descriptor)
        self._connection = Connection(ours.detach())
        with suppress(OSError):  # one that has ended already is found so when it is needed
            self._connection.send_bytes(preparation.to_json())
        self._ready = False

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def ready(self) -> bool:
        """Wait until the process has started; whether it did."""
        if not self._ready:
            try:
                self._ready = self._answer() == b""
            except (OSError, EOFError):
                return False
        return self._ready

    def prepare(self, key: str, data: bytes) -> Prepared:
        """One image, its pixels copied. Raises Rejected for a refused image and DecoderDied for a lost decoder."""
        try:
            self._connection.send_bytes(key.encode())
            self._connection.send_bytes(data)
            answer = json.loads(self._answer())
        except (OSError, EOFError):
            raise DecoderDied(too_slow=self._ended() == -TIME_SIGNAL) from None
        if isinstance(answer, str):
            raise Rejected(Reason(answer))
        geometry = Geometry(*answer)
        shape = (self._views, geometry.crop_height, geometry.crop_width, 3)
        return Prepared(self._pixels[: math.prod(shape)].reshape(shape).copy(), geometry)

    def _answer(self) -> bytes:
        if not self._connection.poll(SILENCE_SECONDS):
            raise EOFError
        return self._connection.recv_bytes()

    def _ended(self) -> int:
        """Its exit status; a process that is still there is killed."""
        try:
            return self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def close(self) -> None:
        """End the process, which has nothing to lose, and wait for its end."""
        self._process.kill()
        self._process.wait()
        self._connection.close()
        os.close(self._lifeline)


class DecoderPool:
    """`size` decoders, of which each call borrows one; lost ones are replaced. Closed when it is collected, too."""

    def __init__(self, preparation: Preparation, size: int) -> None:
        """Start the processes; they get ready in the background."""
        self.preparation = preparation
        self._idle: queue.LifoQueue[Decoder] = queue.LifoQueue()
        self._all: set[Decoder] = set()
        self.close = weakref.finalize(self, _close_all, self._all)
        """End all decoders; no call may be under way."""
        for _ in range(size):
            self._idle.put(self._start())

    def __enter__(self) -> DecoderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """Process ids of the decoders."""
        return sorted(decoder.pid for decoder in tuple(self._all))

    def prepare(self, key: str, data: bytes) -> Prepared:
        """All views of an encoded image, and where they lie in it.

        Raises Rejected: what `images.open_image` refuses, IMAGE_TOO_SLOW above a decoder's processor time, and
        DECODER_DIED if the image took `ATTEMPTS` decoders with it. Raises DecodersUnavailable if none starts.
        """
        for _ in range(ATTEMPTS):
            with self._borrowed() as decoder:
                try:
                    return decoder.prepare(key, data)
                except DecoderDied as death:
                    if death.too_slow:
                        raise Rejected(Reason.IMAGE_TOO_SLOW) from None
        raise Rejected(Reason.DECODER_DIED)

    @contextmanager
    def _borrowed(self) -> Iterator[Decoder]:
        """A decoder that is ready; what is returned dead is replaced by the next that borrows it."""
        decoder = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                if decoder.alive and decoder.ready():
                    break
                decoder = self._replace(decoder)
            else:
                raise DecodersUnavailable("no decoder process starts on this machine; its output above says why")
            yield decoder
        finally:
            self._idle.put(decoder)

    def _start(self) -> Decoder:
        decoder = Decoder(self.preparation)
        self._all.add(decoder)
        return decoder

    def _replace(self, decoder: Decoder) -> Decoder:
        self._all.discard(decoder)
        decoder.close()
        return self._start()


def _close_all(decoders: set[Decoder]) -> None:
    while decoders:
        decoders.pop().close()


def _environment() -> dict[str, str]:
    """This process's environment, fit for a small process of one thread that imports this very package."""
    # What makes an encoder keep freed memory would let every decoder grow to its largest image for good; and what reads
    # hostile images has no business with credentials.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_WITHHELD)}
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

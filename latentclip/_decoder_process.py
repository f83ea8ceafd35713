"""One decoder: a process of its own that turns untrusted images into pixels, and may die of them.

`decoders.Decoder` starts it with a socket, a piece of shared memory and a lifeline. It is told once how to prepare
images, then answers each (key, image) with a reason, or with "" once the pixels lie in the shared memory. It imports no
torch, so that it starts in a fraction of a second and stays small.
"""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from latentclip.images import ImageLimits, Mode, open_image, to_square
from latentclip.rejects import Reason, Rejected
from latentclip.views import ViewRecipe, augment

MEMORY_LIMIT = 2 * 2**30
"""Bytes of address space of a decoder: a decompression bomb is refused by it, whatever a header promised."""
CPU_SECONDS = 10
"""Processor time that one image may take. Not the time on the clock, so that a busy machine rejects no more."""
TIME_SIGNAL = signal.SIGPROF
"""What ends a decoder whose image takes longer."""


@dataclass(frozen=True)
class Preparation:
    """What becomes of an image before it is encoded; the fields are those of `encode.EncodeSettings`."""

    image_size: int
    resize: Mode = "crop"
    views: int = 1
    recipe: ViewRecipe = field(default_factory=ViewRecipe)
    limits: ImageLimits = field(default_factory=ImageLimits)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the pixels: views, rows, columns, colours."""
        return self.views, self.image_size, self.image_size, 3

    def pixels(self, key: str, data: bytes) -> np.ndarray:
        """All views of an encoded image, (views, size, size, 3) uint8; the first is plain. Raises Rejected."""
        image = open_image(data, self.limits)
        plain = to_square(image, self.image_size, self.resize)
        others = (augment(image, key, view, self.image_size, self.recipe) for view in range(1, self.views))
        return np.stack([np.asarray(view) for view in (plain, *others)])

    def to_json(self) -> bytes:
        """As `from_json` reads it."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Preparation:
        """What `to_json` was made of."""
        values = json.loads(data)
        recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("recipe").items()}
        return cls(recipe=ViewRecipe(**recipe), limits=ImageLimits(**values.pop("limits")), **values)


def main() -> None:
    """Answer until the other side closes the socket; the arguments are three file descriptors."""
    socket, memory, lifeline = map(int, sys.argv[1:4])
    _end_with(lifeline)
    connection = Connection(socket)
    preparation = Preparation.from_json(connection.recv_bytes())
    pixels = np.frombuffer(mmap.mmap(memory, int(np.prod(preparation.shape))), np.uint8).reshape(preparation.shape)
    os.close(memory)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    connection.send_bytes(b"")
    while True:
        try:
            key, data = connection.recv_bytes().decode(), connection.recv_bytes()
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = _answer(preparation, key, data, pixels)
        signal.setitimer(signal.ITIMER_PROF, 0)
        connection.send_bytes(answer)


def _answer(preparation: Preparation, key: str, data: bytes, pixels: np.ndarray) -> bytes:
    try:
        pixels[:] = preparation.pixels(key, data)
    except Rejected as reject:
        return reject.reason.encode()
    except MemoryError:
        return Reason.IMAGE_TOO_LARGE.encode()
    return b""


def _end_with(lifeline: int) -> None:
    """Let the kernel end this process once the pipe's other end is gone, even inside a library that hangs.

    Nothing is ever written to it, so the only event is its end, and SIGIO's default action is to terminate.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

"""One decoder: a process of its own that turns untrusted images into pixels, and may die of them.

`decoders.Decoder` starts it with a socket, a piece of shared memory and a lifeline. It is told once how to prepare
images, then answers each (key, image) in JSON: with a reason, or, once the pixels lie in the shared memory, with their
geometry. It imports no torch, so that it starts in a fraction of a second and stays small.
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
from functools import cached_property
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from latentclip.geometry import Geometry, Resize, Size, bucket_sizes, nearest, place
from latentclip.images import ImageLimits, open_image
from latentclip.rejects import Reason, Rejected
from latentclip.views import ViewRecipe, augment

MEMORY_LIMIT = 2 * 2**30
"""Bytes of address space of a decoder: a decompression bomb is refused by it, whatever a header promised."""
CPU_SECONDS = 10
"""Processor time that one image may take. Not the time on the clock, so that a busy machine rejects no more."""
TIME_SIGNAL = signal.SIGPROF
"""What ends a decoder whose image takes longer."""


class Prepared(NamedTuple):
    """An image, ready to be encoded."""

    pixels: np.ndarray
    """(views, height, width, 3) uint8; the first view is plain."""
    geometry: Geometry


@dataclass(frozen=True)
class Preparation:
    """What becomes of an image before it is encoded; the fields are those of `encode.EncodeSettings`."""

    image_size: int
    resize: Resize = "crop"
    views: int = 1
    recipe: ViewRecipe = field(default_factory=ViewRecipe)
    limits: ImageLimits = field(default_factory=ImageLimits)
    bucket_step: int = 64
    bucket_aspect: float = 2.0

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """Width and height of what an image may become."""
        if self.resize == "buckets":
            return bucket_sizes(self.image_size, self.bucket_step, self.bucket_aspect)
        return ((self.image_size, self.image_size),)

    @property
    def largest(self) -> int:
        """Bytes of the pixels of one image, at most."""
        return self.views * max(width * height for width, height in self.sizes) * 3

    def prepare(self, key: str, data: bytes) -> Prepared:
        """All views of an encoded image. Raises Rejected."""
        image = open_image(data, self.limits)
        size = nearest(image.size, self.sizes)
        plain, geometry = place(image, size, self.resize)
        others = (augment(image, key, view, size, self.recipe) for view in range(1, self.views))
        return Prepared(np.stack([np.asarray(view) for view in (plain, *others)]), geometry)

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
    pixels = np.frombuffer(mmap.mmap(memory, preparation.largest), np.uint8)
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
        prepared = preparation.prepare(key, data)
    except Rejected as reject:
        return json.dumps(reject.reason).encode()
    except MemoryError:
        return json.dumps(Reason.IMAGE_TOO_LARGE).encode()
    pixels[: prepared.pixels.size] = prepared.pixels.reshape(-1)
    return json.dumps(prepared.geometry).encode()


def _end_with(lifeline: int) -> None:
    """Let the kernel end this process once the pipe's other end is gone, even inside a library that hangs.

    Nothing is ever written to it, so the only event is its end, and SIGIO's default action is to terminate.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)

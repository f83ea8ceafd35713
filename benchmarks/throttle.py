"""A link of a given rate in front of a local server, in a process of its own.

    with Throttle("http://127.0.0.1:9000", megabytes=40) as link:
        ...  # a client of link.url
        print(link.bytes())

All connections share the rate, as they share a real link: what the server sends waits for its turn in order of
arrival, 64 KiB at a time. What clients send passes at once.
"""

from __future__ import annotations

import multiprocessing
import socket
import threading
import time
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

_CHUNK = 64 << 10
_LATE = 0.02
"""Seconds by which a link may catch up, so that a busy machine's late threads do not make it slower than it is."""
_SPAWN = multiprocessing.get_context("spawn")


class Throttle:
    """The link, until the end of the `with`."""

    def __init__(self, server: str, megabytes: float) -> None:
        address = urlsplit(server)
        self._counter: Any = _SPAWN.Value("q")
        ours, theirs = _SPAWN.Pipe()
        arguments = (address.hostname, address.port, megabytes * 1e6, self._counter, theirs)
        self._process = _SPAWN.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self.url = f"http://127.0.0.1:{ours.recv()}"

    def __enter__(self) -> Throttle:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def bytes(self) -> int:
        """What the server has sent to clients so far, headers included."""
        return int(self._counter.value)


class _Bucket:
    """Hands out the times at which bytes may pass."""

    def __init__(self, rate: float) -> None:
        self.rate, self.free = rate, 0.0
        self.lock = threading.Lock()

    def wait(self, count: int) -> None:
        with self.lock:
            self.free = max(self.free, time.monotonic() - _LATE) + count / self.rate
            turn = self.free
        time.sleep(max(0.0, turn - time.monotonic()))


def _serve(host: str, port: int, rate: float, counter: Any, address: Any) -> None:
    bucket = _Bucket(rate)
    with socket.create_server(("127.0.0.1", 0), backlog=256) as server:
        address.send(server.getsockname()[1])
        while True:
            client, _ = server.accept()
            store = socket.create_connection((host, port))
            for each in (client, store):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_pump, args=(client, store), daemon=True).start()
            threading.Thread(target=_pump, args=(store, client, bucket, counter), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket, bucket: _Bucket | None = None, counter: Any = None) -> None:
    """Pass on what comes until either side ends; a reset is passed on as an end."""
    with suppress(OSError):
        while data := source.recv(_CHUNK):
            if bucket:
                bucket.wait(len(data))
                with counter.get_lock():
                    counter.value += len(data)
            target.sendall(data)
    for each in (source, target):
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)

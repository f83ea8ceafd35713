"""Objects of a store read in parts, several at a time, so that one slow or failing answer costs its part alone.

    fetch("s3://bucket/latents/00000.parquet", size, write=lambda start, part: ...)

Every part has the deadline and the repetitions of any other operation on a store (`_deadline`). Object stores refuse
forked processes; start the workers of a `DataLoader` over remote shards with `multiprocessing_context="spawn"`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from io import UnsupportedOperation
from queue import SimpleQueue

from latentclip.records import ShardCorrupt, ShardMissing
from latentclip.storage import Buffer, Folder, locate

PART = 4 << 20
"""Bytes of one request: large beside a store's latency, small beside what a slow link carries in a request's 30 s."""
AT_ONCE = 8
"""Requests of this process under way at a time, whatever number of shards is being read: the earliest shards first."""


def fetch(url: str, size: int, write: Callable[[int, Buffer], None]) -> None:
    """Read the object of `size` bytes at a URL; `write(start, part)` gets each part once, in any order, in threads.

    Raises:
        ShardMissing: there is no such object.
        ShardCorrupt: it is of another size; nothing is read.
        OSError: the store failed for longer than the deadline; the message names the object.
    """
    folder, name = locate(url)
    try:
        there = folder.size(name)
        if there != size:
            raise ShardCorrupt(
                f"{url} holds {there} bytes, its record says {size}; restore it, or encode its shard again"
            )
        parts = [
            _requests().submit(_read_part, folder, name, start, min(start + PART, size), write)
            for start in range(0, size, PART)
        ]
        try:
            for part in parts:
                part.result()
        finally:
            _settle(parts)
    except UnsupportedOperation:  # a plain HTTP server
        write(0, folder.read(name))
    except FileNotFoundError:
        raise ShardMissing(f"{url} is missing; restore it, or encode its shard again") from None


def _read_part(folder: Folder, name: str, start: int, stop: int, write: Callable[[int, Buffer], None]) -> None:
    part = folder.read_range(name, start, stop)
    if len(part) != stop - start:
        raise OSError(f"{folder.path(name)}: {len(part)} bytes came of the {stop - start} from byte {start} on")
    write(start, part)


def _settle(parts: list[Future[None]]) -> None:
    """Leave no part under way, so that nothing is written once `fetch` has returned or raised."""
    for part in parts:
        part.cancel()
    for part in parts:
        if not part.cancelled():
            part.exception()


class _Requests:
    """A pool whose threads end with the program, where an executor's would first read all that is asked for."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[Future[None], Callable[[], None]]] = SimpleQueue()
        for number in range(AT_ONCE):
            threading.Thread(target=self._work, name=f"fetch-{number}", daemon=True).start()

    def submit(self, operation: Callable[..., None], *arguments: object) -> Future[None]:
        """Run an operation as soon as a thread is free; a cancelled future's is passed over."""
        future: Future[None] = Future()
        self._waiting.put((future, lambda: operation(*arguments)))
        return future

    def _work(self) -> None:
        while True:
            future, operation = self._waiting.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                operation()
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)
            del future, operation  # what they hold of a shard


@cache
def _requests() -> _Requests:
    return _Requests()


os.register_at_fork(after_in_child=_requests.cache_clear)  # its threads are not there

"""Open shards, the least recently used of which are closed; those that will be needed next are opened in threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

Name = TypeVar("Name", bound=Hashable)
Item = TypeVar("Item")


class Shelf(Generic[Name, Item]):
    """At most `capacity` items that nobody waits for, opened by `threads` threads."""

    def __init__(self, open_item: Callable[[Name], Item], capacity: int, threads: int) -> None:
        self._open, self.capacity = open_item, capacity
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="latent-shelf")
        self._items: OrderedDict[Name, Future[Item]] = OrderedDict()
        self._lock = Lock()

    def ask(self, names: Iterable[Name]) -> list[Future[Item]]:
        """Begin to open these items, in this order, unless they are there."""
        with self._lock:
            asked = [self._begin(name) for name in names]
            while len(self._items) > self.capacity:
                self._items.popitem(last=False)
        return asked

    def get(self, names: list[Name]) -> dict[Name, Item]:
        """These items, once they are open. What fails to open raises here, and may be tried again."""
        return {name: self._wait(name, item) for name, item in zip(names, self.ask(names), strict=True)}

    def give_up(self) -> None:
        """Open nothing that is not being opened already; only `get` asks for it again."""
        with self._lock:
            for name, item in list(self._items.items()):
                if item.cancel():
                    del self._items[name]

    def _wait(self, name: Name, item: Future[Item]) -> Item:
        while True:
            try:
                return item.result()
            except CancelledError:  # another reader gave up
                (item,) = self.ask([name])
            except BaseException:
                with self._lock:
                    self._items.pop(name, None)
                raise

    def _begin(self, name: Name) -> Future[Item]:
        if name not in self._items:
            self._items[name] = self._pool.submit(self._open, name)
        self._items.move_to_end(name)
        return self._items[name]

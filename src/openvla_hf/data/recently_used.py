"""A small cache of objects that are slow to open, such as files."""

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, TypeVar


Kept = TypeVar("Kept")


class RecentlyUsed(Generic[Kept]):
    """Keep the most recently used objects, such as open files, and lend each to one thread at a time.

    Threads that need the same object at the same time get one each, so an object that remembers a position is never
    shared. Each process has its own objects. Pickling leaves them out, and a forked process does not use its
    parent's, because both processes share the positions in open files.

    Args:
        most: Number of objects to keep. Beyond this number, the least recently used object is dropped.
    """

    def __init__(self, most: int):
        self.most = most
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        # Least recently used first. An object that is lent is not in the list.
        self._kept: list[tuple[Hashable, Kept]] = []

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], Kept]) -> Iterator[Kept]:
        """Lend the object of a key, and make it if none is kept. After an error, the object is dropped."""
        if self._process != os.getpid():
            # Keep the parent's objects alive: dropping them could wait for threads that exist only in the parent.
            self._inherited = self._kept
            self._start()
        with self._lock:
            found = next((at for at in reversed(range(len(self._kept))) if self._kept[at][0] == key), None)
            lent = None if found is None else self._kept.pop(found)
            # Make room first, so that no more than `most` objects are open.
            dropped = [] if lent else self._kept[: max(0, len(self._kept) - self.most + 1)]
            del self._kept[: len(dropped)]
        del dropped  # outside the lock, since closing a file may take long
        lent = lent or (key, make())
        yield lent[1]
        with self._lock:
            self._kept.append(lent)
            dropped = self._kept[: -self.most]
            del self._kept[: len(dropped)]

    def clear(self) -> None:
        """Drop all objects that are not lent, which closes files."""
        if self._process == os.getpid():
            with self._lock:
                dropped, self._kept = self._kept, []
            del dropped

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


__all__ = ["RecentlyUsed"]

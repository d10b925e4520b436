"""A small cache of objects that are slow to open, such as files."""

import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar


Kept = TypeVar("Kept")


class RecentlyUsed(Generic[Kept]):
    """Keep the most recently used objects, such as open files, for the next use.

    Each process has its own objects. Pickling leaves them out, and a forked process does not use its parent's, because
    both processes share the positions in open files.

    Args:
        most: Number of objects to keep. Beyond this number, the least recently used object is dropped.
    """

    def __init__(self, most: int):
        self.most = most
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()
        self._process = os.getpid()

    def get(self, key: Hashable, make: Callable[[], Kept]) -> Kept:
        """Return the object of a key, and make it if it is not kept."""
        if self._process != os.getpid():
            # Keep the parent's objects alive: dropping them could wait for threads that exist only in the parent.
            self._inherited, self._kept, self._process = self._kept, OrderedDict(), os.getpid()
        if key not in self._kept:
            while len(self._kept) >= self.most:
                self._kept.popitem(last=False)
            self._kept[key] = make()
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Drop all objects, which closes files."""
        if self._process == os.getpid():
            self._kept.clear()

    def __getstate__(self) -> dict[str, Any]:
        return {"most": self.most}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


__all__ = ["RecentlyUsed"]

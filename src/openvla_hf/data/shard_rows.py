"""The rows of the shards of a dataset, which can be read from any position without the data before it.

A section is a shard, or one reader's runs of its rows if several readers share the shard. A group is what one reader
reads in one round: some sections, one after the other. The rows of a group are numbered in the order of reading.
"""

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .episodes import BadEpisodeError, Losses, RecordedEpisode, UnreadableFileError, usable_columns
from .frame_spec import FrameSpec
from .readers.lerobot import LeRobotSource
from .readers.rlds import RLDSSource
from .readers.tfrecord import RecordPlace
from .record_index import NUMBER, OFFSET, ROWS, RecordIndex
from .table_cache import cache_folder, file_version, make_key


# Number of consecutive rows for each of several readers of a shard, since videos are decoded fastest in order.
RUN = 16
# Number of random choices from a shuffle buffer to make at once.
CHOICES = 1024

Row = dict[str, Any]


class ShardRows:
    """The rows of a LeRobot or RLDS dataset, shard by shard.

    Args:
        source: Reader of the dataset.
        spec: Says how its episodes become rows.
        name: Name of the dataset.
        losses: Records what is left out.
    """

    def __init__(self, source: LeRobotSource | RLDSSource, spec: FrameSpec, name: str, losses: Losses):
        self.source, self.spec, self.name, self.losses = source, spec, name, losses
        self.shards: list[Any] = list(source.shards())
        self._versions: dict[str, Any] = {}
        self._records: dict[str, np.ndarray] = {}

    def read(
        self,
        shard: Any,
        place: RecordPlace | None = None,
        watch: Callable[[RecordedEpisode], None] = lambda episode: None,
    ) -> Iterator[tuple[RecordPlace, list[Row]]]:
        """Yield the rows of each usable record, with the record's place, from the record at `place` on.

        A shard that is read from its beginning to its end goes into the index.

        Args:
            shard: Shard.
            place: Place of the first record to read.
            watch: Called with each episode before it is converted.
        """
        found: list[tuple[int, int, int]] = []
        is_complete, at = place is None, RecordPlace()

        def episodes() -> Iterator[RecordedEpisode | BadEpisodeError]:
            nonlocal is_complete, at
            for episode in self.source.read(shard, self.spec, place):
                if isinstance(episode, RecordedEpisode):
                    at = episode.place
                    watch(episode)
                elif isinstance(episode, UnreadableFileError):
                    is_complete = False  # the next attempt may find more
                yield episode

        for columns in usable_columns(episodes(), self.spec, self.name, self.losses):
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            if rows:
                found.append((at.number, at.offset, len(rows)))
                yield at, rows
        if is_complete and self._index.find(shard.key, self._version(shard)) is None:
            self._index.add(shard.key, self._version(shard), np.array(found, np.int64).reshape(-1, 3))

    def records(self, shard: Any) -> np.ndarray:
        """Return the records of a shard that give rows, as `RecordIndex` does. Unknown shards are read."""
        if shard.key not in self._records:
            records = self._index.find(shard.key, self._version(shard))
            if records is None:
                found = [(at.number, at.offset, len(rows)) for at, rows in self.read(shard)]
                records = np.array(found, np.int64).reshape(-1, 3)
            self._records[shard.key] = records
        return self._records[shard.key]

    @functools.cached_property
    def _index(self) -> RecordIndex:
        key = make_key(self.source.root, self.spec, self.name, self.losses.limit)
        return RecordIndex(cache_folder() / f"records-{self.name}-{key}.jsonl")

    def _version(self, shard: Any) -> Any:
        if shard.path not in self._versions:
            self._versions[shard.path] = file_version(self.source.fs, shard.path)
        return self._versions[shard.path]

    def __getstate__(self) -> dict[str, Any]:
        # Another process reads the index itself, and perhaps in another cache folder.
        state = {name: value for name, value in self.__dict__.items() if name != "_index"}
        return state | {"_versions": {}, "_records": {}}


@dataclass(frozen=True)
class Section:
    """Every `of`-th run of a shard's rows, starting with run number `part`."""

    shard: Any
    part: int = 0
    of: int = 1

    def row_of(self, number: int) -> int:
        """Return the row of the shard that is row `number` of the section."""
        run, inside = divmod(number, RUN)
        return number if self.of == 1 else (run * self.of + self.part) * RUN + inside

    def contains(self, row: int) -> bool:
        """Return whether a row of the shard belongs to the section."""
        return row // RUN % self.of == self.part

    def count(self, rows: int) -> int:
        """Return how many of a shard's first rows belong to the section."""
        rounds, rest = divmod(rows, RUN * self.of)
        return rounds * RUN + min(max(rest - self.part * RUN, 0), RUN)


class Group:
    """The rows of some sections, numbered in their order.

    Args:
        rows: Reads the shards.
        sections: Sections in the order in which they are read.
    """

    def __init__(self, rows: ShardRows, sections: Sequence[Section]):
        self.rows, self.sections = rows, sections

    @functools.cached_property
    def ends(self) -> np.ndarray:
        """Number of the row after each section."""
        sizes = [section.count(int(self.rows.records(section.shard)[:, ROWS].sum())) for section in self.sections]
        return np.cumsum(sizes, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.sections) else 0

    def read(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from number `start` on, without reading the records before it."""
        first = int(np.searchsorted(self.ends, start, side="right")) if start else 0
        for at, section in enumerate(self.sections[first:], start=first):
            skipped = start - int(self.ends[at - 1] if at else 0) if start and at == first else 0
            yield from self._read_section(section, skipped)

    def _read_section(self, section: Section, skipped: int) -> Iterator[Row]:
        number, place, first = 0, None, section.row_of(skipped)
        if skipped:
            record, number = _find_record(self.rows.records(section.shard), first)
            place = RecordPlace(int(record[NUMBER]), int(record[OFFSET]))
        for _, rows in self.rows.read(section.shard, place):
            for row in rows:
                if number >= first and section.contains(number):
                    yield row
                number += 1

    def fetch(self, numbers: Sequence[int]) -> list[Row]:
        """Return rows by their numbers, without those of records that can't be read now.

        Each record that contains some of the rows is read once.
        """
        order = np.argsort(numbers, kind="stable")
        found: dict[int, Row] = {}
        held: Any = None
        rows: list[Row] = []
        is_readable = False
        for number in np.asarray(numbers)[order].tolist():
            at = int(np.searchsorted(self.ends, number, side="right"))
            section = self.sections[at]
            row = section.row_of(number - int(self.ends[at - 1] if at else 0))
            record, first = _find_record(self.rows.records(section.shard), row)
            if held != (at, record[NUMBER]):
                held = at, record[NUMBER]
                place = RecordPlace(int(record[NUMBER]), int(record[OFFSET]))
                at_record, rows = next(self.rows.read(section.shard, place), (RecordPlace(-1), []))
                is_readable = at_record.number == record[NUMBER]
            if is_readable:
                found[number] = rows[row - first]
        return [found[number] for number in numbers if number in found]


def _find_record(records: np.ndarray, row: int) -> tuple[np.ndarray, int]:
    """Return the record that contains a row of a shard, and the number of the record's first row."""
    ends = np.cumsum(records[:, ROWS])
    at = int(np.searchsorted(ends, row, side="right"))
    return records[at], int(ends[at] - records[at, ROWS])


def shuffled(group: Group, size: int, rng: np.random.Generator, start: int = 0) -> Iterator[Row]:
    """Yield the rows of a group through a shuffle buffer, from position `start` of the shuffled order on.

    Each row that leaves the buffer is replaced by the next row of the group, and in the end the buffer is emptied at
    random. The rows that are in the buffer at `start` are found by their numbers, so no earlier row is read.

    Args:
        group: Rows.
        size: Number of rows in the buffer.
        rng: Source of the choices.
        start: Number of rows to pass over.
    """
    slots, replaced = list(range(size)), 0
    if start:
        slots = slots[: len(group)]
        replaced = min(start, len(group) - len(slots))
    choices: deque[int] = deque()
    for number in range(size, size + replaced):
        choices = choices or deque(rng.integers(size, size=CHOICES).tolist())
        slots[choices.popleft()] = number
    if start > replaced:  # the group is read to its end
        order = rng.permutation(len(slots))[start - replaced :]
        yield from group.fetch([slots[place] for place in order])
        return
    rows = group.read(replaced + len(slots) if start else 0)
    buffer = group.fetch(slots) if start else []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
            continue
        choices = choices or deque(rng.integers(size, size=CHOICES).tolist())
        place = choices.popleft()
        yield buffer[place]
        buffer[place] = row
    yield from (buffer[place] for place in rng.permutation(len(buffer)).tolist())


__all__ = ["RUN", "Group", "Section", "ShardRows", "shuffled"]

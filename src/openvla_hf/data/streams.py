"""Streams of frames: endless draws by weight, which ranks and workers share evenly."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.utils.data
from datasets import Features, IterableDataset, concatenate_datasets

from .datasets_internals import constructor_arguments
from .episodes import BadEpisodeError, Losses
from .frame_spec import CAMERA_PREFIX, FEATURES
from .frames import FrameDecoder, decoded_features, is_stored
from .images import ImageReader
from .shard_rows import RUN, Group, Section, ShardRows, shuffled


# Number of rows to read from `datasets` at once.
DECODED_ROWS = 16
# Number of random choices among the parts to make at once.
CHOICES = 1024

Row = dict[str, Any]
# Streams with their shares of the draws.
Parts = Sequence[tuple[IterableDataset, float]]


class FrameStream(IterableDataset):
    """An `IterableDataset` of frames that also gives its rows before their images are decoded.

    Operations of `datasets`, such as `map`, turn it into a plain `IterableDataset`.

    Args:
        rows: Rows whose images are references.
        name: Name of the dataset.
        num_frames: Number of frames in one pass, or `None` if it is unknown.
        losses: Says whether damaged images are skipped, and records them.
        cache_key: Returns a name of the stream's content, under which its statistics are cached.
        shuffle_buffer: Number of rows to keep in memory and draw from; 0 keeps the order.
        seed: Seed of the shuffling and of a mixture's draws.
        images: Reads the images.
        features: Columns of the rows, see `FrameSpec.features`.
        shards: Reads the rows from any position, if they come from files.

    Attributes:
        parts: For a mixture, whose rows are endless, its streams with their shares of the draws; empty otherwise.
    """

    parts: Parts = ()

    def __init__(
        self,
        rows: IterableDataset,
        name: str,
        num_frames: int | None = None,
        losses: Losses | None = None,
        cache_key: Callable[[], str] | None = None,
        shuffle_buffer: int = 0,
        seed: int = 0,
        images: ImageReader | None = None,
        features: Features = FEATURES,
        shards: ShardRows | None = None,
    ):
        self.shards = shards
        self.unshuffled, self.shuffle_buffer, self.row_features = rows, shuffle_buffer, features
        if shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.losses, self.decoder = losses or Losses(), FrameDecoder(images)
        frames = rows.map(
            _decode,
            remove_columns=list(filter(is_stored, features)),
            fn_kwargs={"losses": self.losses, "decoder": self.decoder},
            features=decoded_features(features),
        )
        if self.losses.limit:
            frames = frames.filter(_is_frame)
        super().__init__(**constructor_arguments(frames))
        self.rows, self.name, self.num_frames, self.cache_key = rows, name, num_frames, cache_key
        self.seed = seed
        self._latest: IterableDataset | None = None
        self._position: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[Row]:
        yield from self._start()

    def iter(self, batch_size: int, drop_last_batch: bool = False) -> Iterator[dict[str, list[Any]]]:
        """Iterate in batches, as `datasets` does."""
        yield from self._start().iter(batch_size, drop_last_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the iterator that started last."""
        return super().state_dict() if self._latest is None else self._latest.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the iterators that start from now on continue at a position."""
        self._position = state_dict

    def _start(self) -> IterableDataset:
        """Start an iterator at the position that was loaded."""
        self._latest = _copy(self, self.epoch)
        self._latest.load_state_dict(self._position)
        return self._latest

    def repeat(self, num_times: int | None) -> IterableDataset:
        """Repeat the stream as `datasets` does, but with a different order for each pass over a shuffled stream."""
        if num_times is None:
            return mix_streams([(self, 1.0)])
        if not self.shuffle_buffer or num_times < 1:
            return super().repeat(num_times)
        seeds = np.random.SeedSequence(self.seed).generate_state(num_times - 1)
        later = [self._reshuffle(self.shuffle_buffer, int(seed)) for seed in seeds]
        return concatenate_datasets([self, *later])

    def with_shuffle_buffer(self, shuffle_buffer: int) -> "FrameStream":
        """Return the same frames with a shuffle buffer of another size."""
        stream = self._reshuffle(shuffle_buffer, self.seed)
        stream.info.description = self.info.description
        return stream

    def first(self, count: int) -> "FrameStream":
        """Return a stream of the first frames, in the order of the files."""
        return FrameStream(
            self.unshuffled.take(count),
            self.name,
            losses=self.losses,
            images=self.decoder.images,
            features=self.row_features,
        )

    def _reshuffle(self, shuffle_buffer: int, seed: int) -> "FrameStream":
        return FrameStream(
            self.unshuffled,
            self.name,
            self.num_frames,
            self.losses,
            self.cache_key,
            shuffle_buffer,
            seed,
            self.decoder.images,
            self.row_features,
            self.shards,
        )


def _decode(row: Row, losses: Losses, decoder: FrameDecoder) -> Row:
    """Decode a row. If its image is damaged and may be skipped, the result has no instruction; see `_is_frame`."""
    try:
        return decoder.decode_row(row)
    except BadEpisodeError as error:
        losses.note(error, (row.get("dataset"), row.get("episode_index")))
        images = "images" if any(name.startswith(CAMERA_PREFIX) for name in row) else "image"
        return {name: value for name, value in row.items() if not is_stored(name)} | {
            images: None,
            "instruction": None,
        }


def _is_frame(row: Row) -> bool:
    return row["instruction"] is not None


def mix_streams(parts: Parts, seed: int = 0) -> FrameStream:
    """Make an endless stream that draws from each part by its share. Each of its shards reads all parts."""
    readers = min(part.num_shards for part, _ in parts)
    arguments = {"readers": list(range(readers)), "of": readers, "parts": tuple(parts), "seed": seed}
    rows = IterableDataset.from_generator(_read_mixture, gen_kwargs=arguments)
    noted = [part.losses for part, _ in parts if isinstance(part, FrameStream)]
    totals = [losses.total for losses in noted if losses.total is not None]
    losses = Losses(max((one.limit for one in noted), default=0.0), sum(totals) if len(totals) == len(parts) else None)
    features = next((part.row_features for part, _ in parts if isinstance(part, FrameStream)), FEATURES)
    mixture = FrameStream(rows, "mixture", losses=losses, seed=seed, features=features)
    mixture.parts = tuple(parts)
    return mixture


def _read_mixture(readers: list[int], of: int, parts: Parts, seed: int) -> Iterator[Row]:
    # The draws are endless, so only the first reader is ever reached.
    for row in draw(parts, readers[0], of, seed):
        del row["epoch"]
        yield row


def draw(parts: Parts, reader: int = 0, readers: int = 1, seed: int = 0, start: int = 0) -> Iterator[Row]:
    """Draw rows endlessly from streams by their shares, as one of several readers.

    Rows of a `FrameStream` are not decoded yet. Rows of any other stream are passed on unchanged.

    Args:
        parts: Streams with their shares of the draws.
        reader: Number of this reader, from 0.
        readers: Number of readers that read the same streams at the same pace, such as the workers of all ranks.
        seed: Seed of the choice among the parts.
        start: Number of draws to pass over.
    """
    shares = np.array([share for _, share in parts])
    rng = np.random.default_rng([seed, reader])
    blocks = (rng.choice(len(parts), size=CHOICES, p=shares / shares.sum()) for _ in itertools.repeat(None))
    passed = np.zeros(len(parts), np.int64)
    for _ in range(start // CHOICES):
        passed += np.bincount(next(blocks), minlength=len(parts))
    block = next(blocks)
    passed += np.bincount(block[: start % CHOICES], minlength=len(parts))
    sources = [
        read_endlessly(part, reader, readers, each) for (part, _), each in zip(parts, passed.tolist(), strict=True)
    ]
    for choice in itertools.chain(block[start % CHOICES :], itertools.chain.from_iterable(blocks)):
        yield next(sources[choice])


def read_endlessly(stream: IterableDataset, reader: int, readers: int, start: int = 0) -> Iterator[Row]:
    """Read a stream endlessly, as one of several readers that share it evenly.

    The shards are dealt into as many groups as there are readers. Every reader goes through all groups and starts with
    a different one. One round of all readers is therefore one pass over the data. After as many rounds as there are
    readers, each reader has drawn every frame once, even if shards differ in size. A shuffled stream has a new order
    in each round.

    Args:
        stream: Stream.
        reader: Number of this reader, from 0.
        readers: Number of readers.
        start: Number of rows to pass over. Streams of files pass over them without reading them.

    Yields:
        Rows, each with the number of its round as `epoch`.

    Raises:
        ValueError: The stream has no rows.
    """
    if isinstance(stream, FrameStream) and stream.shards is not None:
        yield from _read_files(stream, stream.shards, reader, readers, start)
    else:
        yield from itertools.islice(_read_rows(_rows(stream), reader, readers), start, None)


def _read_files(stream: FrameStream, rows: ShardRows, reader: int, readers: int, start: int) -> Iterator[Row]:
    groups = divide_shards(stream, rows, readers)
    found = True
    for turn in itertools.count():
        found = _require_frames(found, turn, readers)
        number = (reader + turn) % readers
        rng = np.random.default_rng([stream.seed, turn, number])
        sections = groups[number]
        if turn or stream.shuffle_buffer:
            sections = [sections[place] for place in rng.permutation(len(sections))]
        group = Group(rows, sections)
        if start and start >= len(group):
            start -= len(group)
            found = found or len(group) > 0
            continue
        read = shuffled(group, stream.shuffle_buffer, rng, start) if stream.shuffle_buffer else group.read(start)
        start = 0
        for row in read:
            found = True
            yield row | {"epoch": turn}


def divide_shards(stream: FrameStream, rows: ShardRows, readers: int) -> list[list[Section]]:
    """Divide the shards of a stream into a group for each reader: worker w of rank r is reader w * ranks + r."""
    shards = rows.shards
    if stream.shuffle_buffer:
        shards = [shards[place] for place in np.random.default_rng(stream.seed).permutation(len(shards))]
    # With fewer shards than groups, several groups share a shard and take turns with runs of its rows.
    sharing = max(1, -(-readers // max(1, len(shards))))
    sections = [Section(shard, part, sharing) for part in range(sharing) for shard in shards]
    return [sections[group::readers] for group in range(readers)]


def _read_rows(rows: IterableDataset, reader: int, readers: int) -> Iterator[Row]:
    found = True
    for turn in itertools.count():
        found = _require_frames(found, turn, readers)
        for row in _read_group(rows, (reader + turn) % readers, readers, turn):
            found = True
            yield row | {"epoch": turn}


def _require_frames(found: bool, turn: int, readers: int) -> bool:
    """Raise `ValueError` if a whole round found no frames. Return what is found so far in this round."""
    if turn % readers:
        return found
    if not found:
        raise ValueError("The stream has no frames to train on.")
    return False


def _read_group(rows: IterableDataset, group: int, groups: int, epoch: int) -> Iterator[Row]:
    shards = rows.num_shards
    if shards >= groups:
        yield from _read(rows.shard(groups, group, contiguous=False), epoch)
        return
    # With fewer shards than groups, several groups share a shard and take turns with runs of its rows.
    sharing = -(-groups // shards)
    for unit in range(group, shards * sharing, groups):
        for index, row in enumerate(_read(rows.shard(shards, unit % shards), epoch)):
            if index // RUN % sharing == unit // shards:
                yield row


def _copy(stream: IterableDataset, epoch: int) -> IterableDataset:
    """Copy a stream for one iterator: iterators of `datasets` share a position, which threads would corrupt."""
    copy = stream.shard(1, 0)
    copy.set_epoch(epoch)
    return copy


def _read(rows: IterableDataset, epoch: int) -> Iterator[Row]:
    rows = _copy(rows, epoch)
    # `iter(rows)` would divide the rows among the workers of a data loader a second time.
    for batch in rows.iter(batch_size=DECODED_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class TrainingStream(torch.utils.data.IterableDataset):
    """The frames that one rank of a training run draws endlessly from a stream, for a `DataLoader`.

    Each worker decodes only the frames that it yields. Together, the workers of all ranks draw every frame equally
    often. Each frame contains the number of the pass over its data as `epoch`.

    The samples of a run are numbered through all steps, ranks and batches. Readers give them in turn, and each of
    them a batch at a time. At first, each worker of each rank is one reader. A run that is resumed with other numbers
    of ranks and workers keeps its readers and their batches in `order`, so that each step has the same samples.

    Args:
        stream: Frames.
        rank: Number of this process, from 0.
        ranks: Number of processes that train.
        batch_size: Number of frames in a batch of this rank.

    Attributes:
        first_batch: Number of this rank's batches that a resumed run has already used. For each of their frames, the
            stream yields an empty dict. Streams of files don't read them: an index of the records, which is made when
            they are read first, says where to continue.
        order: Number of readers, and number of samples that a reader gives at a time; by default those of the
            current ranks, workers and batches.
    """

    def __init__(self, stream: IterableDataset, rank: int = 0, ranks: int = 1, batch_size: int = 1):
        self.rank, self.ranks, self.batch_size = rank, ranks, batch_size
        self.first_batch = 0
        self.order: tuple[int, int] | None = None
        self.parts, self.losses, self.decoder = _parts(stream), _losses(stream), _decoder(stream)
        self.seed = stream.seed if isinstance(stream, FrameStream) else 0

    def __iter__(self) -> Iterator[Row]:
        index, workers = _worker()
        used = len(range(index, self.first_batch, workers))
        yield from ({} for _ in range(used * self.batch_size))
        waiting = 0
        for row in self._read(itertools.count(index + used * workers, workers), workers):
            waiting += 1
            if _is_frame(frame := _decode(row, self.losses, self.decoder)):
                # Repeat the frame in place of the damaged ones before it, since a resumed run counts one frame per
                # row.
                yield from [frame] * waiting
                waiting = 0

    def _read(self, batches: Iterable[int], workers: int) -> Iterator[Row]:
        """Read the rows of the given batches of this rank."""
        readers, together = self.order or (self.ranks * workers, self.batch_size)
        opened: dict[int, _Reader] = {}
        for batch in batches:
            first = (batch * self.ranks + self.rank) * self.batch_size
            for sample in range(first, first + self.batch_size):
                turn, number = divmod(sample // together, readers)
                reader = opened.setdefault(number, _Reader(self.parts, number, readers, self.seed))
                yield reader.read(turn * together + sample % together)


class _Reader:
    """The rows of one of several readers, at increasing positions. See `draw`."""

    def __init__(self, parts: Parts, number: int, readers: int, seed: int):
        self.parts, self.number, self.readers, self.seed = parts, number, readers, seed
        self.position = 0
        self.rows: Iterator[Row] | None = None

    def read(self, position: int) -> Row:
        if self.rows is None:
            self.rows = draw(self.parts, self.number, self.readers, self.seed, position)
            self.position = position
        # Another worker has the rows between, if a resumed run has more workers than readers.
        row = next(itertools.islice(self.rows, position - self.position, None))
        self.position = position + 1
        return row


class EvaluationStream(torch.utils.data.IterableDataset):
    """The frames of one pass over a stream that one rank evaluates, for a `DataLoader`.

    Each worker decodes only the frames that it yields. All workers of all ranks yield the same number of frames,
    because the ranks wait for each other after each batch. Workers with fewer frames repeat the first undamaged one,
    with `is_padding`, which metrics leave out.

    Args:
        stream: Frames. Each stream of a mixture is read once.
        rank: Number of this process, from 0.
        ranks: Number of processes that evaluate.
    """

    def __init__(self, stream: IterableDataset, rank: int = 0, ranks: int = 1):
        self.rank, self.ranks = rank, ranks
        self.parts, self.losses, self.decoder = _parts(stream), _losses(stream), _decoder(stream)

    def __iter__(self) -> Iterator[Row]:
        index, workers = _worker()
        reader, readers = self.rank * workers + index, self.ranks * workers
        count, taken = 0, 0
        for count, row in enumerate(self._read_once(), start=1):
            if (count - 1) % readers == reader and _is_frame(frame := self._decode(row)):
                taken += 1
                yield frame
        if lacking := -(-count // readers) - taken:
            first = next(filter(_is_frame, map(self._decode, self._read_once())), None)
            if first is None:
                raise ValueError("Every frame of the stream is damaged, so there is nothing to evaluate on.")
            yield from [first | {"is_padding": True}] * lacking

    def _decode(self, row: Row) -> Row:
        return _decode(row, self.losses, self.decoder)

    def _read_once(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(_read(_rows(part), 0) for part, _ in self.parts)


def _worker() -> tuple[int, int]:
    """Return the number of this worker of a data loader, and the number of workers."""
    worker = torch.utils.data.get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _parts(stream: IterableDataset) -> Parts:
    """Return the streams of a mixture with their shares, or the stream alone."""
    return stream.parts if isinstance(stream, FrameStream) and stream.parts else ((stream, 1.0),)


def _rows(stream: IterableDataset) -> IterableDataset:
    """Return the rows of a stream before decoding, if it has them."""
    return stream.rows if isinstance(stream, FrameStream) else stream


def _losses(stream: IterableDataset) -> Losses:
    return stream.losses if isinstance(stream, FrameStream) else Losses()


def _decoder(stream: IterableDataset) -> FrameDecoder:
    return stream.decoder if isinstance(stream, FrameStream) else FrameDecoder()


__all__ = [
    "EvaluationStream",
    "FrameStream",
    "TrainingStream",
    "divide_shards",
    "draw",
    "mix_streams",
    "read_endlessly",
]

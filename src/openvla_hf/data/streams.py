"""Streams of frames: endless draws that ranks and workers share evenly, by weight where there are several."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch.utils.data
from datasets import IterableDataset, concatenate_datasets

from .frames import DECODED, BadEpisodeError, Losses, decode_frame


RUN = 16
"""Consecutive rows that one reader takes where several read the same shard: a video is decoded fastest in order."""
READ_ROWS = 16
"""Rows that are taken from `datasets` at once."""
CHOICES = 1024
"""Draws of a part that are made at once."""

Row = dict[str, Any]
Parts = Sequence[tuple[IterableDataset, float]]
"""Streams with their shares of the draws."""


class FrameStream(IterableDataset):
    """An `IterableDataset` of frames which knows its rows before their images are decoded.

    Operations of `datasets` on it, such as `map`, give a plain `IterableDataset`.

    Args:
        rows: Rows whose images are references, as in `frames.FEATURES`.
        name: Name of the data set.
        num_frames: Frames of one pass, or None where the metadata does not say.
        losses: Whether damaged images are skipped, and where they are noted.
        cache_key: Gives a name of what is in the stream, under which its statistics are kept.
        parts: Of a mixture, its streams with their shares of the draws; `rows` then has no end.
        shuffle_buffer: Rows held to draw from in a shuffled stream; 0 keeps the order.
        seed: Of the shuffling, and of the draws of a mixture.
    """

    def __init__(
        self,
        rows: IterableDataset,
        name: str,
        num_frames: int | None = None,
        losses: Losses | None = None,
        cache_key: Callable[[], str] | None = None,
        parts: Parts = (),
        shuffle_buffer: int = 0,
        seed: int = 0,
    ):
        self.unshuffled, self.shuffle_buffer = rows, shuffle_buffer
        if shuffle_buffer:
            rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        self.losses = losses or Losses()
        frames = rows.map(_decode, fn_kwargs={"losses": self.losses}, features=DECODED)
        if self.losses.limit:
            frames = frames.filter(_is_frame)
        super().__init__(frames._ex_iterable, info=frames.info, split=frames.split)
        self.rows, self.name, self.num_frames, self.cache_key = rows, name, num_frames, cache_key
        self.parts, self.seed = tuple(parts), seed

    def repeat(self, num_times: int | None) -> IterableDataset:
        """As in `datasets`, but each pass over a shuffled stream has its own order."""
        if num_times is None:
            return mix_streams([(self, 1.0)])
        if not self.shuffle_buffer or num_times < 1:
            return super().repeat(num_times)
        seeds = np.random.SeedSequence(self.seed).generate_state(num_times - 1)
        later = [
            FrameStream(
                self.unshuffled, self.name, losses=self.losses, shuffle_buffer=self.shuffle_buffer, seed=int(seed)
            )
            for seed in seeds
        ]
        return concatenate_datasets([self, *later])


def _decode(row: Row, losses: Losses) -> Row:
    """A row's frame; one without an instruction where the image is damaged and bad episodes are skipped."""
    try:
        return decode_frame(row)
    except BadEpisodeError as error:
        losses.note(error, (row.get("dataset"), row.get("episode_index")))
        return row | {"image": None, "instruction": None}


def _is_frame(row: Row) -> bool:
    return row["instruction"] is not None


def mix_streams(parts: Parts, seed: int = 0) -> FrameStream:
    """A stream without an end that draws from each part by its share; its shards are readers of all parts."""
    readers = min(part.num_shards for part, _ in parts)
    arguments = {"readers": list(range(readers)), "of": readers, "parts": tuple(parts), "seed": seed}
    rows = IterableDataset.from_generator(_read_mixture, gen_kwargs=arguments)
    noted = [part.losses for part, _ in parts if isinstance(part, FrameStream)]
    totals = [losses.total for losses in noted if losses.total is not None]
    losses = Losses(max((one.limit for one in noted), default=0.0), sum(totals) if len(totals) == len(parts) else None)
    return FrameStream(rows, "mixture", losses=losses, parts=parts, seed=seed)


def _read_mixture(readers: list[int], of: int, parts: Parts, seed: int) -> Iterator[Row]:
    # The draws have no end, so the first reader is the only one that is reached.
    return draw(parts, readers[0], of, seed)


def draw(parts: Parts, reader: int = 0, readers: int = 1, seed: int = 0) -> Iterator[Row]:
    """Draw rows without an end from streams by their shares, as one of several readers.

    Rows of a `FrameStream` are not decoded yet; those of any other stream are taken as they come.

    Args:
        parts: Streams with their shares of the draws.
        reader: Number of this reader, from 0.
        readers: How many read the same streams at the same pace, such as the workers of all ranks.
        seed: Of the choice among the parts.
    """
    sources = [read_endlessly(_rows(part), reader, readers) for part, _ in parts]
    shares = np.array([share for _, share in parts])
    rng = np.random.default_rng([seed, reader])
    while True:
        for choice in rng.choice(len(sources), size=CHOICES, p=shares / shares.sum()):
            yield next(sources[choice])


def read_endlessly(rows: IterableDataset, reader: int, readers: int) -> Iterator[Row]:
    """Read a stream over and over, as one of several readers that share it evenly.

    The shards are dealt into as many groups as there are readers. All readers go through all groups, each beginning
    with its own: a round of the readers is a pass over the data, and after as many rounds as readers each has drawn
    every frame once, however the shards differ in size. Each round has another order where the stream is shuffled.

    Raises:
        ValueError: The stream has no rows.
    """
    found = True
    for turn in itertools.count():
        if turn % readers == 0:
            if not found:
                raise ValueError("The stream has no frames to train on.")
            found = False
        for row in _read_group(rows, (reader + turn) % readers, readers, turn):
            found = True
            yield row


def _read_group(rows: IterableDataset, group: int, groups: int, epoch: int) -> Iterator[Row]:
    shards = rows.num_shards
    if shards >= groups:
        yield from _read(rows.shard(groups, group, contiguous=False), epoch)
        return
    # Too few shards to give one to each group: several share a shard and take turns with runs of its rows.
    sharing = -(-groups // shards)
    for unit in range(group, shards * sharing, groups):
        for index, row in enumerate(_read(rows.shard(shards, unit % shards), epoch)):
            if index // RUN % sharing == unit // shards:
                yield row


def _read(rows: IterableDataset, epoch: int) -> Iterator[Row]:
    rows.set_epoch(epoch)
    # `iter(rows)` would share the rows between the workers of a data loader once more.
    for batch in rows.iter(batch_size=READ_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


class TrainingStream(torch.utils.data.IterableDataset):
    """The frames that one rank of a training run draws from a stream, without an end, for a `DataLoader`.

    Each worker decodes only what it yields. All workers of all ranks draw every frame equally often.

    Args:
        stream: Frames.
        rank: Number of this process, from 0.
        ranks: How many processes train.
        batch_size: Frames of a batch of this rank.

    Attributes:
        first_batch: Batches of this rank that a resumed run has already used. They are passed over without decoding:
            an empty frame stands for each of theirs.
    """

    def __init__(self, stream: IterableDataset, rank: int = 0, ranks: int = 1, batch_size: int = 1):
        self.rank, self.ranks, self.batch_size = rank, ranks, batch_size
        self.first_batch = 0
        self.parts, self.losses = _parts(stream), _losses(stream)
        self.seed = stream.seed if isinstance(stream, FrameStream) else 0

    def __iter__(self) -> Iterator[Row]:
        index, workers = _worker()
        rows = draw(self.parts, self.rank * workers + index, self.ranks * workers, self.seed)
        used = len(range(index, self.first_batch, workers)) * self.batch_size
        yield from ({} for _ in itertools.islice(rows, used))
        waiting = 0
        for row in rows:
            waiting += 1
            if _is_frame(frame := _decode(row, self.losses)):
                # The next frame stands in for damaged ones: frames stay as many as rows, which a resumed run counts.
                yield from [frame] * waiting
                waiting = 0


class EvaluationStream(torch.utils.data.IterableDataset):
    """The frames that one rank evaluates of one pass over a stream, for a `DataLoader`.

    Each worker decodes only what it yields. All workers of all ranks yield equally many frames, because the ranks
    wait for each other after each batch: those that have too few repeat the first frame that is not damaged.

    Args:
        stream: Frames. Of a mixture, each of its streams is read once.
        rank: Number of this process, from 0.
        ranks: How many processes evaluate.
    """

    def __init__(self, stream: IterableDataset, rank: int = 0, ranks: int = 1):
        self.rank, self.ranks = rank, ranks
        self.parts, self.losses = _parts(stream), _losses(stream)

    def __iter__(self) -> Iterator[Row]:
        index, workers = _worker()
        reader, readers = self.rank * workers + index, self.ranks * workers
        count, taken = 0, 0
        for count, row in enumerate(self._read_once(), start=1):
            if (count - 1) % readers == reader and _is_frame(frame := _decode(row, self.losses)):
                taken += 1
                yield frame
        if lacking := -(-count // readers) - taken:
            frames = (_decode(row, self.losses) for row in self._read_once())
            first = next(filter(_is_frame, frames), None)
            if first is None:
                raise ValueError("Every frame of the stream is damaged, so there is nothing to evaluate on.")
            yield from [first] * lacking

    def _read_once(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(_read(_rows(part), 0) for part, _ in self.parts)


def _worker() -> tuple[int, int]:
    """Number of this worker of a data loader, and how many there are."""
    worker = torch.utils.data.get_worker_info()
    return (0, 1) if worker is None else (worker.id, worker.num_workers)


def _parts(stream: IterableDataset) -> Parts:
    """The streams of a mixture with their shares, or the stream alone."""
    return stream.parts if isinstance(stream, FrameStream) and stream.parts else ((stream, 1.0),)


def _rows(stream: IterableDataset) -> IterableDataset:
    """The rows of a stream before decoding, where it knows them."""
    return stream.rows if isinstance(stream, FrameStream) else stream


def _losses(stream: IterableDataset) -> Losses:
    return stream.losses if isinstance(stream, FrameStream) else Losses()


__all__ = ["EvaluationStream", "FrameStream", "TrainingStream", "draw", "mix_streams", "read_endlessly"]

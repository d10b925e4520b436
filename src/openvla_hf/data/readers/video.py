"""Frames of a video by their time, at the speed of decoding in sequence where they are asked for in sequence."""

import functools
import os
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np

from ..frames import BadEpisodeError, import_extra


OPEN_VIDEOS = 4
"""Videos that a process keeps open: each holds a decoder with its reference frames."""


class Video:
    """An open video, which remembers where it is.

    Args:
        path: File or URL.

    Raises:
        BadEpisodeError: no video can be read there.
    """

    def __init__(self, path: str):
        self.path = path
        self.av = import_extra("av", "data")
        try:
            # A local path goes to FFmpeg as it is: it reads faster than through Python.
            source = fsspec.open(path, "rb").open() if "://" in path else path
            self.container = self.av.open(source)
            self.stream = self.container.streams.video[0]
        except (self.av.FFmpegError, IndexError) as error:
            raise BadEpisodeError(f"{path}: no video can be read ({error}).") from error
        # More threads would fight with the data loader's workers.
        self.stream.codec_context.thread_count = 1
        self.frame_time = float(1 / self.stream.average_rate)
        self.end = float((self.stream.start_time + self.stream.duration) * self.stream.time_base)
        self.frames: Iterator[Any] = iter(())
        self.last = -np.inf

    def read(self, time: float) -> np.ndarray:
        """The frame that is shown at `time` (seconds), uint8 (H, W, 3).

        Raises:
            BadEpisodeError: the video is damaged or ends before.
        """
        try:
            # Forwards by a few frames, decoding them is faster than finding a key frame.
            if not self.last < time - self.frame_time / 2 <= self.last + 8 * self.frame_time:
                self.container.seek(
                    max(0, int((time - self.frame_time / 2) / self.stream.time_base)), stream=self.stream
                )
                self.frames = self.container.decode(self.stream)
            for frame in self.frames:
                if frame.time is None:
                    continue
                self.last = frame.time
                if self.last > time - self.frame_time / 2:
                    if self.last > time + self.frame_time / 2:
                        break
                    return frame.to_ndarray(format="rgb24", threads=1)
        except self.av.FFmpegError as error:
            self.last = np.inf
            raise BadEpisodeError(f"{self.path}, {time:.3f} s: the video is damaged ({error}).") from error
        self.last = np.inf
        raise BadEpisodeError(f"{self.path}: there is no frame at {time:.3f} s; the video is cut or not this data's.")


_open = functools.lru_cache(maxsize=OPEN_VIDEOS)(Video)
# A process that is forked, such as a data loader's worker, shares the positions in its parent's files, and waits for
# ever where it closes a decoder whose threads stayed with the parent. So none is open while forking.
close_videos = _open.cache_clear
os.register_at_fork(before=close_videos)


def check_frame(path: str, time: float) -> None:
    """Raises `BadEpisodeError` where a video can't be opened or ends before `time` (seconds); nothing is decoded."""
    video = _open(path)
    if time > video.end - video.frame_time / 2:
        raise BadEpisodeError(f"{path}: there is no frame at {time:.3f} s; the video ends at {video.end:.3f} s.")


def read_frame(path: str, time: float) -> np.ndarray:
    """The frame that a video shows at `time` (seconds), uint8 (H, W, 3); see `Video`."""
    return _open(path).read(time)


__all__ = ["Video", "check_frame", "close_videos", "read_frame"]

"""Frames of a video by their time. Reading them in sequence is as fast as decoding."""

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..episodes import BadEpisodeError
from ..optional_packages import import_extra
from ..remote import find_folder, open_file


# Up to this many frames ahead, decoding all frames in between is faster than seeking to a key frame.
DECODE_AHEAD = 8
# Bytes of a remote video to request at once. Smaller than for records, since several videos are open.
VIDEO_PIECE = 2**20


class Video:
    """An open video, which remembers its position. Its file is closed when the object is deleted.

    Args:
        path: File or URL.

    Raises:
        BadEpisodeError: The file is missing or is not a video.
    """

    def __init__(self, path: str):
        self.path = path
        self.av = import_extra("av", "data")
        try:
            # FFmpeg reads a local file faster than Python does.
            source = open_file(*find_folder(path), VIDEO_PIECE) if "://" in path else path
            self.container = self.av.open(source)
            # A container and its streams refer to each other, so closing would otherwise wait for the cycle collector.
            weakref.finalize(self, self.container.close)
            self.stream = self.container.streams.video[0]
        except (self.av.FFmpegError, IndexError) as error:
            raise BadEpisodeError(f"{path}: the video can't be read ({error}).") from error
        # More threads would compete with the data loader's workers.
        self.stream.codec_context.thread_count = 1
        self.frame_time = float(1 / self.stream.average_rate)
        self.end = float((self.stream.start_time + self.stream.duration) * self.stream.time_base)
        self.frames: Iterator[Any] = iter(())
        self.last = -np.inf

    def check(self, time: float) -> None:
        """Require that the video shows a frame at `time` (seconds), without decoding it.

        Raises:
            BadEpisodeError: The video ends before `time`.
        """
        if time > self.end - self.frame_time / 2:
            raise BadEpisodeError(
                f"{self.path}: there is no frame at {time:.3f} s; the video ends at {self.end:.3f} s."
            )

    def read(self, time: float) -> np.ndarray:
        """Return the frame that the video shows at `time` (seconds), uint8 (H, W, 3).

        Raises:
            BadEpisodeError: The video is damaged or has no frame at this time.
        """
        try:
            if not self.last < time - self.frame_time / 2 <= self.last + DECODE_AHEAD * self.frame_time:
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
        raise BadEpisodeError(
            f"{self.path}: there is no frame at {time:.3f} s; the video is cut short or belongs to another dataset."
        )


__all__ = ["Video"]

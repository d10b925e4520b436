"""Ctrl-C while training: a checkpoint is saved, and nothing is lost."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


ECHO = 1.0
"""Seconds in which a second signal is the same Ctrl-C, which a launcher passes on to processes that got it already."""


class SaveOnInterrupt(TrainerCallback):
    """Ends training after the step in which Ctrl-C is pressed, with a checkpoint; a second Ctrl-C ends it at once.

    As a context manager, it handles the signal from entry to exit. Of several processes, all stop after the same step.

    Attributes:
        stopped: Whether training ended because of Ctrl-C.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._requested_at: float | None = None
        self._announces = False
        self._process = os.getpid()

    def __enter__(self) -> "SaveOnInterrupt":
        self._previous: Any = None
        if threading.current_thread() is threading.main_thread():  # elsewhere, signals can't be handled
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Processes that read data are forked with this handler: they go on until the step has its batches.
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            if self._announces and os.getpid() == self._process:
                # Not through `sys.stderr`, which may be in the middle of a write.
                os.write(2, b"\nStopping after this step and saving. Press Ctrl-C again to stop at once.\n")
        elif time.monotonic() - self._requested_at > ECHO:
            raise KeyboardInterrupt

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Let one of the processes tell the user."""
        self._announces = state.is_world_process_zero

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop if Ctrl-C was pressed; a run that is complete ends as it would."""
        requested = torch.tensor(float(self._requested_at is not None), device=args.device)
        if reduce(requested, reduction="sum").item() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


__all__ = ["SaveOnInterrupt"]

"""Save a checkpoint when Ctrl-C is pressed, so that no step is lost."""

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
"""Seconds within which a second signal counts as the same Ctrl-C, since a launcher sends it on to its processes."""


class SaveOnInterrupt(TrainerCallback):
    """Save a checkpoint and end training after the step in which Ctrl-C is pressed; a second Ctrl-C ends it at once.

    Use it as a context manager, which handles the signal from entry to exit, and as a callback. Several processes all
    stop after the same step.

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
        if threading.current_thread() is threading.main_thread():  # Python handles signals only there
            self._previous = signal.signal(signal.SIGINT, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        # Workers of the data loader are forked with this handler. They continue until the step has its batches.
        if self._requested_at is None:
            self._requested_at = time.monotonic()
            if self._announces and os.getpid() == self._process:
                # A signal may interrupt a write to `sys.stderr`, which then refuses another one.
                os.write(2, b"\nStopping after this step and saving. Press Ctrl-C again to stop at once.\n")
        elif time.monotonic() - self._requested_at > ECHO:
            raise KeyboardInterrupt

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Choose the process that informs the user."""
        self._announces = state.is_world_process_zero

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        """Save and stop if Ctrl-C was pressed before the last step."""
        requested = torch.tensor(float(self._requested_at is not None), device=args.device)
        if reduce(requested, reduction="sum").item() and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


__all__ = ["SaveOnInterrupt"]

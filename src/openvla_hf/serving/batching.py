"""Dynamic batching: join the requests of several robots into one prediction."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .errors import Busy, PredictionFailed, ServingError, ShuttingDown, Superseded
from .policy import Prediction, Prepared, ServedPolicy


logger = logging.getLogger(__name__)

RECENT = 1.0
"""Seconds for which a robot counts as active after its last request."""
RETRY_AFTER = 1.0
"""Seconds after which a refused client may try again."""


@dataclass(frozen=True)
class Batched:
    """A prediction, the size of the batch it was made in, and the seconds that the request waited for it."""

    prediction: Prediction
    batch_size: int
    queue_seconds: float


@dataclass(eq=False)  # compare by identity, since arrays have no single truth value
class _Waiting:
    prepared: Prepared
    robot: Hashable | None
    since: float
    latest: float  # when its batch starts even without the other robots
    answer: asyncio.Future[Batched]


class Batcher:
    """Queue of requests in front of a policy, which predicts in a thread of its own.

    While the policy predicts, new requests wait for the next batch. A batch starts as soon as it is full or
    contains every active robot, and at the latest after `max_wait`. A single robot therefore never waits.

    Args:
        policy: The policy.
        max_batch: Largest number of observations in a batch.
        max_wait: Longest time in seconds that a batch waits for active robots.
        max_queue: Largest number of waiting requests.
    """

    def __init__(self, policy: ServedPolicy, max_batch: int = 8, max_wait: float = 0.005, max_queue: int = 64):
        self.policy, self.max_batch, self.max_wait, self.max_queue = policy, max_batch, max_wait, max_queue
        self._queue: list[_Waiting] = []
        self._last_seen: dict[Hashable, float] = {}
        self._changed = asyncio.Event()
        self._is_closing = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return len(self._queue)

    def start(self) -> None:
        """Start to predict, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Refuse new requests, answer the waiting ones, and stop."""
        self._is_closing = True
        self._changed.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    async def predict(self, prepared: Prepared, robot: Hashable | None = None) -> Batched:
        """Predict one observation, in a batch with others.

        Args:
            prepared: The observation.
            robot: Identity of the robot. A newer request of the same robot replaces a waiting one.

        Raises:
            Busy: The queue is full, or the device ran out of memory.
            Superseded: A newer request of this robot came before the prediction started.
            PredictionFailed: The policy failed on this observation.
            ShuttingDown: The server is shutting down.
        """
        if self._is_closing:
            raise ShuttingDown("The server is shutting down.", RETRY_AFTER)
        since = time.perf_counter()
        future: asyncio.Future[Batched] = asyncio.get_running_loop().create_future()
        request = _Waiting(prepared, robot, since, since + self.max_wait, future)
        place = next((i for i, one in enumerate(self._queue) if robot is not None and one.robot == robot), None)
        if place is not None:
            stale, self._queue[place] = self._queue[place], request
            request.latest = stale.latest  # a robot that asks again and again does not delay the others
            if not stale.answer.done():
                stale.answer.set_exception(Superseded("A newer observation of this robot replaced this one."))
        elif len(self._queue) >= self.max_queue:
            raise Busy(f"The queue is full ({self.max_queue} requests): try again later.", RETRY_AFTER)
        else:
            self._queue.append(request)
        if robot is not None:
            self._last_seen[robot] = request.since
        self._changed.set()
        try:
            return await request.answer
        finally:  # the client may have disconnected
            if request in self._queue:
                self._queue.remove(request)

    def forget(self, robot: Hashable) -> None:
        """Stop waiting for a robot that has left."""
        self._last_seen.pop(robot, None)
        self._changed.set()

    async def _run(self) -> None:
        while True:
            while not self._queue and not self._is_closing:
                self._changed.clear()
                await self._changed.wait()
            if not self._queue:
                return
            await self._gather()
            batch, self._queue = self._queue[: self.max_batch], self._queue[self.max_batch :]
            if not batch:  # the clients have disconnected
                continue
            started = time.perf_counter()
            answers = await self._predict_in_thread([one.prepared for one in batch])
            for one, answer in zip(batch, answers, strict=True):
                if one.answer.done():  # the client has disconnected
                    continue
                if isinstance(answer, ServingError):
                    one.answer.set_exception(answer)
                else:
                    one.answer.set_result(Batched(answer, len(batch), started - one.since))

    async def _gather(self) -> None:
        """Wait until the batch is full, every active robot is in it, or the first request has waited long enough."""
        while self._queue and not self._is_closing:
            now = time.perf_counter()
            self._last_seen = {robot: seen for robot, seen in self._last_seen.items() if now - seen < RECENT}
            waiting = {one.robot for one in self._queue}
            rest = self._queue[0].latest - now
            if len(self._queue) >= self.max_batch or self._last_seen.keys() <= waiting or rest <= 0:
                return
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), rest)

    async def _predict_in_thread(self, batch: Sequence[Prepared]) -> Sequence[Prediction | ServingError]:
        """Predict a batch. Whatever goes wrong is an answer, so that the queue goes on."""
        predicting = asyncio.get_running_loop().run_in_executor(self._thread, self._predict, batch)
        await asyncio.wait([predicting])
        error = predicting.exception()
        if error is None:
            return predicting.result()
        logger.error("The policy failed.", exc_info=error)
        return [PredictionFailed(f"{type(error).__name__}: {error}")] * len(batch)

    def _predict(self, batch: Sequence[Prepared]) -> Sequence[Prediction | ServingError]:
        """Predict a batch. If the output for an observation is not finite, the other observations still succeed."""
        try:
            return self.policy.predict(batch)
        except ValueError as error:
            if len(batch) == 1:
                return [PredictionFailed(str(error))]
            return [answer for one in batch for answer in self._predict([one])]
        except ServingError as error:
            return [error] * len(batch)
        except (MemoryError, torch.OutOfMemoryError):
            return [_out_of_memory(len(batch))] * len(batch)
        except RuntimeError as error:
            # On the CPU, PyTorch raises a plain RuntimeError.
            if "not enough memory" in str(error) or "can't allocate memory" in str(error):
                return [_out_of_memory(len(batch))] * len(batch)
            raise


def _out_of_memory(size: int) -> Busy:
    return Busy(f"Out of memory in a batch of {size}: try again, or lower --max-batch on the server.", RETRY_AFTER)


__all__ = ["Batched", "Batcher"]

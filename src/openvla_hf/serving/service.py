"""The service that all protocols share: a policy, its queue, the sessions and the metrics."""

import asyncio
import math
import re
import secrets
import time
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from PIL import Image

from .batching import RETRY_AFTER, Batcher
from .errors import PredictionFailed, SessionExpired, ShuttingDown, Superseded, TooManyRequests, Unprocessable
from .images import EncodedImage
from .metrics import Metrics
from .policy import Observation, Prediction, Prepared, ServedPolicy, Session


MILLISECONDS = 1000

Part = TypeVar("Part")


@dataclass(frozen=True)
class ServiceOptions:
    """Limits of a service.

    Attributes:
        max_batch: Largest number of observations in a batch.
        max_wait_ms: Longest time that a batch waits for active robots.
        max_queue: Largest number of waiting requests.
        max_sessions: Largest number of open sessions.
        session_seconds: Time after which an unused session expires.
        max_body_bytes: Largest request.
        request_seconds: Time within which the body of a request must arrive.
        max_pixels: Largest image.
        max_instruction: Longest instruction in characters.
        requests_per_second: Largest rate of one client; `None` for no limit.
        token: Token that clients must send; `None` for no authentication.
        allowed_hosts: Names, besides localhost and IP addresses, under which clients reach the server.
        original_errors: Whether `POST /act` answers every error as the original does: `"error"` with status 200.
        camera_keys: Name of a camera of the policy -> key under which clients send its image.
    """

    max_batch: int = 8
    max_wait_ms: float = 5.0
    max_queue: int = 64
    max_sessions: int = 256
    session_seconds: float = 600.0
    max_body_bytes: int = 32 * 2**20
    request_seconds: float = 30.0
    max_pixels: int = 4096 * 4096
    max_instruction: int = 1000
    requests_per_second: float | None = None
    token: str | None = field(default=None, repr=False)
    allowed_hosts: Sequence[str] = ()
    original_errors: bool = False
    camera_keys: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_sessions", "max_body_bytes", "max_pixels", "max_instruction"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if not 0 <= self.max_wait_ms < math.inf:
            raise ValueError(f"`max_wait_ms` must be a finite number of at least 0, got {self.max_wait_ms}.")
        for name in ("session_seconds", "request_seconds", "requests_per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be above 0, got {value}.")
        if self.token is not None and not re.fullmatch("[!-~]+", self.token):
            raise ValueError("The token must consist of letters, digits and punctuation of ASCII, without spaces.")


@dataclass(frozen=True)
class Answer:
    """What a robot gets for one observation.

    Attributes:
        actions: (n, A) float64 to execute before the next observation, in the server's gripper convention.
        prediction: The whole prediction.
        batch_size: Number of observations that were predicted together.
        timings: Milliseconds by stage: `queue_ms`, `preprocess_ms`, `model_ms` and `total_ms`.
    """

    actions: np.ndarray
    prediction: Prediction
    batch_size: int
    timings: dict[str, float]


@dataclass
class _Open:
    session: Session
    used: float
    is_connected: bool  # whether the session ends with a connection
    asked: int = 0  # number of requests so far
    queued: int = 0  # number of the newest request that has reached the queue


class Service:
    """A policy that acts for many robots at once. Every protocol calls `act`.

    Args:
        policy: The policy.
        options: The limits.
        session_prefix: Start of the ids of sessions, by which a load balancer finds the server of a session.
    """

    def __init__(self, policy: ServedPolicy, options: ServiceOptions | None = None, session_prefix: str = ""):
        self.policy, self._session_prefix = policy, session_prefix
        self.options = options = options or ServiceOptions()
        for camera in options.camera_keys:
            if camera not in policy.cameras:
                raise ValueError(
                    f"This policy has no camera {camera!r}: its cameras are {', '.join(map(repr, policy.cameras))}."
                )
        self.metrics = Metrics()
        self.is_ready = False
        self._is_stopping = False
        self._arriving: set[asyncio.Timeout] = set()  # limits of the requests that have not arrived completely
        self._sessions: dict[str, _Open] = {}

    async def start(self) -> None:
        """Start the queue, and predict once, since the first prediction takes longer."""
        options = self.options
        self._batcher = Batcher(self.policy, options.max_batch, options.max_wait_ms / MILLISECONDS, options.max_queue)
        self.metrics.queue.set_function(lambda: len(self._batcher))
        self.metrics.sessions.set_function(lambda: len(self._sessions))
        self._batcher.start()
        blank = await asyncio.to_thread(self.policy.prepare, self.blank_observation())
        try:
            await self._batcher.predict(blank)
        except PredictionFailed:
            if not self.policy.model.config.reasoning:  # a text about a black image may lack an action
                raise
        self.is_ready = True

    async def stop(self) -> None:
        """Answer the waiting requests, refuse those that have not arrived completely, and stop."""
        self.is_ready, self._is_stopping = False, True
        for limit in self._arriving:
            if not limit.expired():
                limit.reschedule(0.0)
        await self._batcher.close()

    async def receive(self, part: Awaitable[Part], deadline: float) -> Part:
        """Wait for a part of a request until a time of the event loop, or until the service stops.

        Raises:
            TimeoutError: The part did not arrive in time.
            ShuttingDown: The service stops.
        """
        try:
            async with asyncio.timeout_at(0.0 if self._is_stopping else deadline) as limit:
                self._arriving.add(limit)
                return await part
        except TimeoutError:
            if self._is_stopping:
                raise ShuttingDown("The server is shutting down.", RETRY_AFTER) from None
            raise
        finally:
            self._arriving.discard(limit)

    def blank_observation(self) -> Observation:
        """Return a black image for each camera, and a state of zeros."""
        image = Image.new("RGB", (224, 224))
        state = None if self.policy.state_dim is None else np.zeros(self.policy.state_dim)
        key = self.policy.default_key or next(iter(self.policy.model.norm_stats))
        return Observation(dict.fromkeys(self.policy.cameras, image), "do nothing", state, key)

    async def act(self, observation: Observation, session_id: str | None = None) -> Answer:
        """Predict the actions for one observation of one robot.

        Raises:
            ServingError: The observation does not fit the policy, the session has expired, or the server can't answer.
        """
        started = time.perf_counter()
        with self.metrics.count_errors():
            answer = await self._act(observation, session_id, started)
        self.metrics.requests.labels("ok").inc()
        self.metrics.forward_passes.inc(answer.prediction.forward_passes)
        self.metrics.batch_size.observe(answer.batch_size)
        for name, value in answer.timings.items():
            self.metrics.seconds.labels(name.removesuffix("_ms")).observe(value / MILLISECONDS)
        return answer

    async def _act(self, observation: Observation, session_id: str | None, started: float) -> Answer:
        if len(observation.instruction) > self.options.max_instruction:
            raise Unprocessable(
                f"The instruction has {len(observation.instruction)} characters, and this server takes at most "
                f"{self.options.max_instruction}."
            )
        robot = self._new_session() if session_id is None else self._find(session_id)
        session = robot.session
        robot.asked += 1
        number, observation, episode = robot.asked, session.observe(observation), session.episode
        try:
            prepared = await asyncio.to_thread(self._prepare, observation)
        except (OSError, TypeError, ValueError) as error:
            raise Unprocessable(str(error)) from error
        if number < robot.queued:  # a large image takes longer to prepare
            raise Superseded("A newer observation of this robot replaced this one.")
        robot.queued = number
        batched = await self._batcher.predict(prepared, session_id)
        if session.episode != episode:
            raise Superseded("The robot has started a new episode since this observation.")
        prediction = batched.prediction
        seconds = {
            "queue": batched.queue_seconds,
            "preprocess": prediction.preprocess_seconds,
            "model": prediction.model_seconds,
            "total": time.perf_counter() - started,
        }
        timings = {f"{name}_ms": round(value * MILLISECONDS, 3) for name, value in seconds.items()}
        return Answer(session.receive(prediction), prediction, batched.batch_size, timings)

    def _prepare(self, observation: Observation) -> Prepared:
        """Decode the images that clients sent as files, and convert the observation to the model's inputs."""
        started = time.perf_counter()
        decoded = {
            camera: image.decode() if isinstance(image, EncodedImage) else image
            for camera, image in observation.images.items()
        }
        prepared = self.policy.prepare(replace(observation, images=decoded))
        return replace(prepared, seconds=time.perf_counter() - started)

    def open_session(self, is_connected: bool = False) -> str:
        """Open a session and return its id.

        Args:
            is_connected: Whether the session ends with a connection. Otherwise it expires.

        Raises:
            TooManyRequests: There are too many open sessions.
        """
        self._drop_expired()
        if len(self._sessions) >= self.options.max_sessions:
            raise TooManyRequests(
                f"The server allows {len(self._sessions)} open sessions: close one, or try again later."
            )
        session_id = self._session_prefix + secrets.token_urlsafe(16)
        self._sessions[session_id] = self._new_session(is_connected)
        return session_id

    def _new_session(self, is_connected: bool = False) -> _Open:
        return _Open(self.policy.open_session(), time.monotonic(), is_connected)

    def reset_session(self, session_id: str) -> None:
        """Start a new episode in a session; raise `SessionExpired` if it is not open."""
        self._find(session_id).session.reset()

    def close_session(self, session_id: str) -> None:
        """Forget a session; raise `SessionExpired` if it is not open."""
        self._find(session_id)
        del self._sessions[session_id]
        self._batcher.forget(session_id)

    def _find(self, session_id: str) -> _Open:
        self._drop_expired()
        if session_id not in self._sessions:
            raise SessionExpired("This session has expired or was never opened: open a new one.")
        found = self._sessions[session_id]
        found.used = time.monotonic()
        return found

    def _drop_expired(self) -> None:
        oldest = time.monotonic() - self.options.session_seconds
        for session_id, found in list(self._sessions.items()):
            if found.used < oldest and not found.is_connected:
                del self._sessions[session_id]
                self._batcher.forget(session_id)


__all__ = ["Answer", "Service", "ServiceOptions"]

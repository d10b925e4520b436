"""A client of a served policy, for a robot's own computer. It needs NumPy, Pillow and httpx, but not PyTorch."""

import base64
import contextlib
import io
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
from PIL import Image


try:
    import httpx
except ModuleNotFoundError as error:
    raise ImportError(
        'The client of a server needs httpx: run `pip install "openvla-hf[serve]"`.', name=error.name
    ) from error


ONLY_CAMERA = "image"
"""Name of the camera of a policy that sees one image without a name."""
FIRST_PAUSE = 0.05
"""Seconds before the first retry of a request that did not arrive. The pause doubles with each retry."""
GATEWAY_ERRORS = (500, 502, 503, 504)
"""Statuses of a proxy that can't reach the server behind it."""
PROXY_ERROR = "http"
"""Kind of an error that came from a program other than the server, such as a proxy."""
SESSION_HEADER = "X-Session-Id"
"""Header with the session of a request, by which a load balancer finds the replica of the session."""
CLOSING_SECONDS = 1.0
"""Longest time in seconds that `close` waits for the server."""
PIECE = 2**16
"""Bytes of a request that are sent before the client looks at the time again."""
REMEMBERED = 1000
"""Number of predictions in the statistics of the round trip."""

ImageLike = Image.Image | np.ndarray


class ServerError(OSError):
    """A request was refused, failed, or got no answer in time.

    Attributes:
        reason: A sentence that says what is wrong.
        status: HTTP status of the answer; `None` if there is none.
        kind: Name of the error, from the server (such as "busy") or one of "unreachable", "disconnected", "timeout",
            "bad_answer" or "policy_changed".
        retry_after: Seconds after which the server takes the request again.
    """

    def __init__(self, reason: str, kind: str, status: int | None = None, retry_after: float | None = None):
        super().__init__(reason if status is None else f"{reason} ({status} {kind})")
        self.reason, self.kind, self.status, self.retry_after = reason, kind, status, retry_after


@dataclass(frozen=True)
class RoundTrip:
    """Statistics of the time from a call of `predict_action` to its answer, over the last predictions.

    Attributes:
        count: Number of predictions.
        last: Seconds of the last one.
        median: Median in seconds.
        p95: 95th percentile in seconds.
        longest: Longest in seconds.
    """

    count: int
    last: float
    median: float
    p95: float
    longest: float


class Client:
    """Connection to a server that `openvla-hf serve` has started.

    A call either returns an answer within `timeout` or raises `ServerError`. Until then, the client asks again if the
    server can't be reached or asks to come back later. It also asks again if the connection breaks, since a prediction
    changes nothing on the server except in a session with temporal ensembling. Threads may share a client.

    Example:
        ```python
        with Client("http://gpu-server:8000", timeout=1.0) as client:
            action = client.predict_action(image, "pick up the red block")
        ```

    Args:
        url: Address of the server, such as "http://gpu-server:8000".
        token: Token of the server, if it needs one.
        timeout: Seconds within which an answer must arrive. A later answer is stale and is never returned. If the
            network stalls in the middle of a message, the error can come up to twice as late.
        jpeg_quality: Quality from 1 to 100 of images that are sent as JPEG. By default, images are sent as PNG, which
            keeps every pixel. JPEG is smaller and faster, but changes pixels and may change actions.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(self, url: str, token: str | None = None, *, timeout: float = 10.0, jpeg_quality: int | None = None):
        _check_address(url)
        if token is not None and not (token.isascii() and token.isprintable() and token == token.strip() != ""):
            raise ValueError("The token must consist of ASCII characters, without spaces or line breaks around it.")
        if not timeout > 0:
            raise ValueError(f"`timeout` must be above 0 seconds, got {timeout}.")
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
            raise ValueError(f"`jpeg_quality` must be from 1 to 100, or `None` for PNG, got {jpeg_quality}.")
        self.url, self.timeout, self.jpeg_quality = url.rstrip("/"), timeout, jpeg_quality
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)
        self._http = httpx.Client(
            base_url=self.url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @cached_property
    def info(self) -> dict[str, Any]:
        """The server's description of its policy: cameras, state, statistics, gripper and more. Requested once."""
        return self._read_info(self._deadline())

    @property
    def round_trip(self) -> RoundTrip:
        """Measured times of the last predictions, all NaN before the first."""
        seconds = list(self._seconds)
        if not seconds:
            return RoundTrip(0, *[np.nan] * 4)
        median, p95 = np.percentile(seconds, [50, 95]).tolist()
        return RoundTrip(len(seconds), seconds[-1], median, p95, max(seconds))

    def predict_action(
        self,
        images: ImageLike | Mapping[str, ImageLike],
        instruction: str,
        state: Sequence[float] | np.ndarray | None = None,
        unnorm_key: str | None = None,
    ) -> np.ndarray:
        """Predict the next action, or the next chunk of actions.

        Args:
            images: The image, or a dict with the image of each camera: PIL, or uint8 (H, W, 3) in RGB.
            instruction: Task of the robot.
            state: (S,) in robot units, if the policy sees it.
            unnorm_key: Name of the statistics; `None` for the server's default.

        Returns:
            float64 (A,) in robot units, or (K, A) to execute one after the other if the server answers with chunks.
            The gripper has the convention of `info["gripper"]`.

        Raises:
            ServerError: The server gave no answer in time, or refused the request.
            ValueError: An image or the state can't be sent.
            TypeError: An image is neither a PIL image nor an array.
        """
        started = time.monotonic()
        observation = self._write_observation(images, instruction, state, unnorm_key)
        return self._act(observation, started)

    def session(self) -> "ClientSession":
        """Open a session for one robot. The server uses each action as a draft of the next, which saves passes."""
        return ClientSession(self)

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout

    def _read_info(self, deadline: float) -> dict[str, Any]:
        info = self._ask("GET", "/info", deadline)
        if not isinstance(info, dict) or info.get("server") != "openvla-hf":
            raise self._bad_answer()
        return info

    def _write_observation(
        self,
        images: ImageLike | Mapping[str, ImageLike],
        instruction: str,
        state: Sequence[float] | np.ndarray | None,
        unnorm_key: str | None,
    ) -> dict[str, Any]:
        cameras = images if isinstance(images, Mapping) else {ONLY_CAMERA: images}
        encoded = {name: _encode_image(image, self.jpeg_quality) for name, image in cameras.items()}
        return {
            "images": {name: base64.b64encode(one).decode("ascii") for name, one in encoded.items()},
            "instruction": instruction,
            "state": None if state is None else _encode_state(state),
            "unnorm_key": unnorm_key,
        }

    def _act(
        self, observation: Mapping[str, Any], started: float, can_repeat: bool = True, **content: Any
    ) -> np.ndarray:
        answer = self._ask("POST", "/v1/act", started + self.timeout, can_repeat, body=observation, **content)
        try:
            actions = np.array(answer["actions"], dtype=np.float64)
        except (KeyError, TypeError, ValueError) as error:
            raise self._bad_answer() from error
        if actions.ndim != 2 or not actions.size or not np.isfinite(actions).all():
            raise self._bad_answer()
        self._seconds.append(time.monotonic() - started)
        return actions[0] if len(actions) == 1 else actions

    def _ask(self, method: str, path: str, deadline: float, can_repeat: bool = True, **content: Any) -> Any:
        """Send a request, with retries where they are safe, and return the JSON of an answer before the deadline.

        Args:
            method: HTTP method.
            path: Path on the server.
            deadline: Time on the monotonic clock.
            can_repeat: Whether the request may be sent again if its answer is lost.
            content: `body` of the request, sent as JSON, and its `headers`.
        """
        pause = FIRST_PAUSE
        while True:
            try:
                response = self._send(method, path, deadline, **content)
            except httpx.TimeoutException as error:
                raise self._stale() from error
            except httpx.ConnectError as error:
                failure = ServerError(
                    f"Cannot connect to {self.url}: {error}. Check the address, and check that the server is running.",
                    "unreachable",
                )
            except httpx.TransportError as error:
                failure = ServerError(f"The connection to {self.url} broke ({error}).", "disconnected")
                if not can_repeat:
                    raise failure from error
            else:
                if response.is_success:
                    return self._read_json(response)
                failure = _read_error(response)
                if failure.retry_after is not None:
                    pause = failure.retry_after or pause
                elif not (can_repeat and failure.kind == PROXY_ERROR and failure.status in GATEWAY_ERRORS):
                    raise failure
            if time.monotonic() + pause >= deadline:
                raise failure
            time.sleep(pause)
            pause *= 2

    def _send(
        self, method: str, path: str, deadline: float, body: Mapping[str, Any] | None = None, **content: Any
    ) -> httpx.Response:
        """Send a request and receive its answer in pieces, and give up at the deadline.

        httpx limits the time of each piece only, so a slow network could hold up a robot for much longer.
        """
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise self._stale()
        if body is not None:
            text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
            pieces = (text[start : start + PIECE] for start in range(0, len(text), PIECE))
            headers = {"Content-Type": "application/json", "Content-Length": str(len(text))}
            content = {"content": self._in_time(pieces, deadline), "headers": headers | content.get("headers", {})}
        with self._http.stream(method, path, timeout=remaining, **content) as response:
            answer = b"".join(self._in_time(response.iter_raw(), deadline))
        return httpx.Response(response.status_code, headers=response.headers, content=answer, request=response.request)

    def _in_time(self, pieces: Iterable[bytes], deadline: float) -> Iterator[bytes]:
        """Pass on pieces of a message until the deadline."""
        for piece in pieces:
            if time.monotonic() > deadline:
                raise self._stale()
            yield piece

    def _read_json(self, response: httpx.Response) -> Any:
        try:
            return response.json() if response.content else None
        except ValueError as error:
            raise self._bad_answer() from error

    def _stale(self) -> ServerError:
        return ServerError(
            f"{self.url} gave no answer within {self.timeout:g} s. Stop the robot: a later action would belong to an "
            "old observation.",
            "timeout",
        )

    def _bad_answer(self) -> ServerError:
        return ServerError(f"{self.url} does not answer like an openvla-hf server. Check the address.", "bad_answer")


class ClientSession:
    """One robot's episodes on a server, as `Client.session` opens them. Close it, or use it in a `with` statement.

    If the server has forgotten the session because it restarted, or because the robot paused for too long, the client
    opens a new one and asks again. With temporal ensembling this would change the robot's movement, so it raises
    `ServerError` with status 410 until `reset` starts a new episode.
    """

    def __init__(self, client: Client):
        self._client = client
        self._has_memory = client.info["temporal_ensemble"] is not None
        self._id = self._open(client._deadline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def predict_action(
        self,
        images: ImageLike | Mapping[str, ImageLike],
        instruction: str,
        state: Sequence[float] | np.ndarray | None = None,
        unnorm_key: str | None = None,
    ) -> np.ndarray:
        """Predict like `Client.predict_action`."""
        started = time.monotonic()
        client = self._client
        observation = client._write_observation(images, instruction, state, unnorm_key)
        try:
            return self._act(observation, started, can_repeat=not self._has_memory)
        except ServerError as error:
            if error.kind != "session_expired" or self._has_memory:
                raise
        self._id = self._open(started + client.timeout)
        return self._act(observation, started)

    def _act(self, observation: Mapping[str, Any], started: float, can_repeat: bool = True) -> np.ndarray:
        body = {**observation, "session": self._id}
        return self._client._act(body, started, can_repeat, headers=self._headers())

    def _headers(self) -> dict[str, str]:
        return {SESSION_HEADER: self._id}

    def reset(self) -> None:
        """Start a new episode: the server forgets the last actions."""
        deadline = self._client._deadline()
        try:
            self._client._ask("POST", f"/v1/sessions/{self._id}/reset", deadline, headers=self._headers())
        except ServerError as error:
            if error.kind != "session_expired":
                raise
            self._id = self._open(deadline)

    def close(self) -> None:
        """End the session. If the server can't be reached, the session expires on the server."""
        with contextlib.suppress(ServerError):
            deadline = time.monotonic() + CLOSING_SECONDS
            self._client._ask("DELETE", f"/v1/sessions/{self._id}", deadline, False, headers=self._headers())

    def _open(self, deadline: float) -> str:
        """Open a session, and require that the server still has the same `info`."""
        client = self._client
        if client._read_info(deadline) != client.info:
            raise ServerError(
                f"{client.url} now serves another policy or uses other options. Make a new `Client`, and check its "
                "`info`.",
                "policy_changed",
            )
        return client._ask("POST", "/v1/sessions", deadline)["session"]


def _check_address(url: str) -> None:
    """Raise `ValueError` unless an address is that of an HTTP server."""
    try:
        host = httpx.URL(url).host
    except httpx.InvalidURL:
        host = ""
    if not url.startswith(("http://", "https://")) or not host:
        raise ValueError(
            f"The address of a server must begin with http:// or https:// and a host, such as http://gpu-server:8000, "
            f"got {url!r}."
        )


def _encode_image(image: ImageLike, jpeg_quality: int | None) -> bytes:
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(
                f"An image must be uint8 (H, W, 3) in RGB, got {image.dtype} {image.shape}. Convert it first."
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"An image must be a PIL image or an array, got {type(image).__name__}.")
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"An image must have mode 'RGB' or 'L', got {image.mode!r}. Convert it first.")
    file = io.BytesIO()
    if jpeg_quality is None:
        image.save(file, "PNG", compress_level=1)  # fast, and hardly larger
    else:
        image.save(file, "JPEG", quality=jpeg_quality)
    return file.getvalue()


def _encode_state(state: Sequence[float] | np.ndarray) -> list[float]:
    try:
        values = np.asarray(state, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"A state must consist of numbers, got {state!r}.") from error
    if values.ndim != 1 or not np.isfinite(values).all():
        raise ValueError(f"A state must be a list of finite numbers, got {state!r}.")
    return values.tolist()


def _read_error(response: httpx.Response) -> ServerError:
    """Read an error in the format of the server, or in any other."""
    try:
        body = response.json()
        kind, reason = str(body["error"]), str(body["reason"])
    except (ValueError, KeyError, TypeError):  # the answer of another program, such as a proxy
        kind, reason = PROXY_ERROR, f"{response.request.url} answered with an error."
    retry_after = response.headers.get("Retry-After", "")
    seconds = float(retry_after) if retry_after.isdecimal() else None
    return ServerError(reason, kind, response.status_code, seconds)


__all__ = ["Client", "ClientSession", "RoundTrip", "ServerError"]

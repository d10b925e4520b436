"""The errors that a server answers with, and the HTTP status of each."""

import math

from starlette.responses import JSONResponse


class ServingError(Exception):
    """A request that gets no action.

    Attributes:
        status: HTTP status.
        reason: Sentence for the client.
        retry_after: Seconds after which the client may try again, if trying again can help.
    """

    status = 500

    def __init__(self, reason: str, retry_after: float | None = None):
        super().__init__(reason)
        self.reason, self.retry_after = reason, retry_after

    @property
    def kind(self) -> str:
        """Name of the error in answers, such as "too_large"."""
        return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in type(self).__name__)[1:]


class BadRequest(ServingError):
    """The request can't be read."""

    status = 400


class Unauthorized(ServingError):
    """The token is missing or wrong."""

    status = 401


class Forbidden(ServingError):
    """The request comes from a page of another website, or names the server by an unknown name."""

    status = 403


class RequestTimeout(ServingError):
    """The client sends its request too slowly."""

    status = 408


class Superseded(ServingError):
    """A newer request of the same session replaced this one, or the session has started a new episode."""

    status = 409


class SessionExpired(ServingError):
    """The session has expired, or never existed."""

    status = 410


class TooLarge(ServingError):
    """The request exceeds a limit on its size."""

    status = 413


class UnsupportedMediaType(ServingError):
    """The body has a type that the server does not read."""

    status = 415


class Unprocessable(ServingError):
    """The request is readable, but does not fit the policy."""

    status = 422


class TooManyRequests(ServingError):
    """The client exceeds its rate, or the server has no room for another session."""

    status = 429


class PredictionFailed(ServingError):
    """The policy failed on this observation."""

    status = 500


class Busy(ServingError):
    """The queue is full, the device is out of memory, or vLLM does not answer."""

    status = 503


class ShuttingDown(ServingError):
    """The server is about to stop."""

    status = 503


class ReplicaLost(ServingError):
    """The replica of the server that worked on the request has died."""

    status = 503


def answer_error(error: ServingError) -> JSONResponse:
    """Return the answer for an error, over HTTP or in place of a WebSocket."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, (RequestTimeout, TooLarge, ShuttingDown)):
        headers["Connection"] = "close"  # the rest of the body is not read
    return JSONResponse({"error": error.kind, "reason": error.reason}, error.status, headers)


__all__ = [
    "BadRequest",
    "Busy",
    "Forbidden",
    "PredictionFailed",
    "ReplicaLost",
    "RequestTimeout",
    "ServingError",
    "SessionExpired",
    "ShuttingDown",
    "Superseded",
    "TooLarge",
    "TooManyRequests",
    "Unauthorized",
    "Unprocessable",
    "UnsupportedMediaType",
    "answer_error",
]

"""Code that Ray Serve's proxies run: it chooses the replica of a request, and answers for replicas that have died.

Ray's proxies import this module. It does not import PyTorch.
"""

import random

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ReplicaLost, answer_error


try:
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
except ModuleNotFoundError as error:
    raise ImportError(
        'Replicas on Ray Serve need Ray: run `pip install "openvla-hf[ray]"`.', name=error.name
    ) from error


CHOICES = 2
"""Number of random replicas of which the one with fewer requests is chosen."""


class SessionRouter(RequestRouter):
    """Sends a session to the replica that its id names, and everything else to the less busy of two replicas.

    If the replica of a session has stopped, any other replica gets the request, and answers that the session has
    expired.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try."""
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = (
            True  # pause, instead of asking a full replica again and again
        )
        replica_id = pending_request.metadata.session_id.partition(".")[0]
        owners = [one for one in candidate_replicas if one.replica_id.unique_id == replica_id]
        return [owners or random.sample(candidate_replicas, min(CHOICES, len(candidate_replicas)))]


class LostRequests:
    """ASGI middleware that answers 503 if a replica dies while it works on a request.

    Ray's proxy would answer with a plain 500, which clients can't tell from a failure that repeats.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and answer it if the replica has died."""
        has_answer = False

        async def watch(message: Message) -> None:
            nonlocal has_answer
            has_answer = True
            await send(message)

        await self.app(scope, receive, watch)
        if scope["type"] == "http" and not has_answer:
            error = ReplicaLost("The replica died before it answered: send the request again.", retry_after=0)
            await answer_error(error)(scope, receive, send)


def proxy_middlewares() -> list[Middleware]:
    """Return the middleware of Ray's proxies, for the variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(LostRequests)]


__all__ = ["LostRequests", "SessionRouter", "proxy_middlewares"]

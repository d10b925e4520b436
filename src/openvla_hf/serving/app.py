"""The web application of a server: every protocol over one service."""

import asyncio
import logging
import socket
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from http import HTTPStatus
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from . import openpi, original, page, v1
from .connection import Connection
from .errors import ServingError, Unprocessable, answer_error
from .security import OPEN_PATHS, Guard, find_addresses
from .service import Service


logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
MAX_PORT = 2**16 - 1
DRAIN_SECONDS = 30
"""Time in which a stopping server finishes the requests that it has taken."""
LAST_ANSWERS_SECONDS = 2.0
"""Time for WebSockets to send the last answers before they are closed."""


def create_app(service: Service) -> FastAPI:
    """Build the application. Its lifespan starts and stops the service."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    # The service has a limit of its own for the pixels of an image.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # FastAPI's own pages of documentation load scripts from other servers.
    app = FastAPI(title="openvla-hf", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for door in (v1, openpi, original, page):  # routes are tried in this order
        app.include_router(door.router(service))
    app.add_middleware(Guard, service=service)
    for kind, answer in (
        (ServingError, _answer_error),
        (HTTPException, _answer_http_error),
        (RequestValidationError, _answer_validation_error),
        (ClientDisconnect, _answer_nobody),
        (Exception, _answer_failure),
    ):
        app.add_exception_handler(kind, answer)
    if service.options.token is not None:
        _describe_token(app)
    return app


async def _answer_error(request: Request, error: Any) -> Response:
    if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s: %s", error.kind, error.reason)
    return answer_error(error)


async def _answer_http_error(request: Request, error: Any) -> Response:
    kind = HTTPStatus(error.status_code).name.lower()
    return JSONResponse(
        {"error": kind, "reason": f"{str(error.detail).rstrip('.')}."}, error.status_code, error.headers
    )


async def _answer_validation_error(request: Request, error: Any) -> Response:
    return answer_error(Unprocessable(f"{error.errors()[0]['msg']}."))


async def _answer_nobody(request: Request, error: Any) -> Response:
    return Response(status_code=HTTPStatus.BAD_REQUEST)


async def _answer_failure(request: Request, error: Any) -> Response:
    return JSONResponse({"error": "internal", "reason": "The server failed. Its log gives the reason."}, 500)


def _describe_token(app: FastAPI) -> None:
    """Add the token to the OpenAPI document."""
    document = app.openapi()  # FastAPI keeps and serves this object
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    for path in OPEN_PATHS:
        for operation in document["paths"].get(path, {}).values():
            operation["security"] = []


def listen(host: str, port: int) -> socket.socket:
    """Reserve an address. Clients are refused until the server runs.

    Raises:
        ValueError: The port does not exist.
        OSError: The host is unknown, or the port is in use.
    """
    if not 0 <= port <= MAX_PORT:
        raise ValueError(f"`port` must be at most {MAX_PORT}, got {port}.")
    family, kind, protocol, _, address = find_addresses(host, port)[0]
    reserved = socket.socket(family, kind, protocol)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind(address)
    except OSError as error:
        reserved.close()
        raise OSError(
            f"Cannot listen on {host}, port {port}: {error.strerror}. Give another `host` or `port`."
        ) from error
    return reserved


def run_server(
    service: Service,
    reserved: socket.socket,
    *,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or Ctrl-C, and answer the requests that have arrived by then.

    Args:
        service: The service.
        reserved: Address from `listen`.
        ssl_certfile: Certificate for HTTPS.
        ssl_keyfile: Its key, if the certificate's file does not contain it.
        on_ready: Called when the server takes requests.

    Raises:
        ValueError: The policy failed on its first prediction.
        OSError: The certificate or its key can't be read.
    """
    app = _Pending(create_app(service))
    config = uvicorn.Config(
        app,
        http=Connection,
        lifespan="off",  # the server below starts the service, so that errors reach the caller
        log_level="warning",
        access_log=False,
        server_header=False,
        ws_max_size=service.options.max_body_bytes,
        ws_per_message_deflate=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
    )
    logging.getLogger("uvicorn.error").addFilter(_is_about_more_than_a_refusal)
    _Server(config, service, app, on_ready).run([reserved])


_was_refused: ContextVar[bool] = ContextVar("was_refused", default=False)
"""Whether the WebSocket of this task was answered with an HTTP status."""


def _is_about_more_than_a_refusal(record: logging.LogRecord) -> bool:
    """Return whether to log a record: uvicorn takes a refused WebSocket for one without an answer."""
    return not (_was_refused.get() and "without completing handshake" in record.getMessage())


class _Pending:
    """ASGI middleware that counts the requests and the WebSocket messages that have no answer yet."""

    def __init__(self, app: ASGIApp):
        self.app = app
        self.count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_socket = scope["type"] == "websocket"
        waits = not is_socket
        self.count += waits

        def wait(now: bool) -> None:
            nonlocal waits
            self.count += now - waits
            waits = now

        async def read() -> Message:
            message = await receive()
            wait(message["type"] == "websocket.receive")
            return message

        async def answer(message: Message) -> None:
            await send(message)
            wait(False)
            if message["type"] == "websocket.http.response.body":
                _was_refused.set(True)

        try:
            await (self.app(scope, read, answer) if is_socket else self.app(scope, receive, send))
        finally:
            wait(False)


class _Server(uvicorn.Server):
    """A server that drains before it closes its connections, and exits with status 0 after a signal."""

    def __init__(self, config: uvicorn.Config, service: Service, pending: _Pending, on_ready: Callable[[], None]):
        super().__init__(config)
        self._service, self._pending, self._on_ready = service, pending, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await self._service.start()
        except ServingError as error:
            raise ValueError(f"The policy failed on its first prediction: {error.reason}") from error
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.ensure_future(self._service.stop())
        await self._wait_until(stopping.done, DRAIN_SECONDS)
        await self._wait_until(lambda: not self._pending.count, LAST_ANSWERS_SECONDS)
        await super().shutdown(sockets)

    async def _wait_until(self, is_over: Callable[[], bool], seconds: float) -> None:
        """Wait until a condition holds, the time is over, or a second signal comes."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not (is_over() or self.force_exit or loop.time() > end):
            await asyncio.sleep(0.01)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit, self.should_exit = self.should_exit, True


__all__ = ["create_app", "listen", "run_server"]

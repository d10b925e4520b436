"""Checks of who may use the server, how much and how fast, before a request or WebSocket reaches the application."""

import asyncio
import hmac
import ipaddress
import socket
import ssl
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import Forbidden, RequestTimeout, ServingError, TooLarge, TooManyRequests, Unauthorized, answer_error
from .service import Service, ServiceOptions
from .token import TOKEN_VARIABLE


OPEN_PATHS = ("/health", "/healthz", "/", "/page/page.css", "/page/page.js")
"""Paths that need no token over HTTP: the health checks, and the page, which asks for the token itself."""
TOKEN_SCHEMES = ("bearer", "api-key")
MAX_CLIENTS = 10_000
"""Number of clients whose rates are kept before those of idle clients are dropped."""


def find_addresses(host: str, port: int = 0) -> list[Any]:
    """List the addresses of a host, as `socket.getaddrinfo` does; an empty host means all of this machine.

    Raises:
        OSError: The host is unknown.
    """
    try:
        return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise OSError(f"The host {host!r} is unknown: give an IP address or a name of this machine.") from error


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a host; raise `OSError` if it is unknown."""
    return all(ipaddress.ip_address(address[0]).is_loopback for *_, address in find_addresses(host))


def check_exposure(host: str, token: str | None, allow_no_token: bool = False) -> None:
    """Refuse to let other machines command a robot without a token.

    Raises:
        ValueError: Other machines can reach the host, there is no token, and `allow_no_token` is false.
    """
    if token is None and not allow_no_token and not is_loopback(host):
        raise ValueError(
            f"Everyone who reaches {host} could command the robot: give a token with `token_file=` or the variable "
            f"{TOKEN_VARIABLE}, or allow this with `no_token=True`."
        )


def check_certificate(certfile: str | None, keyfile: str | None) -> None:
    """Check the files for HTTPS, if there are any.

    Raises:
        ValueError: The certificate or its key is missing, damaged or encrypted, or they do not belong together.
    """
    if certfile is None:
        if keyfile is not None:
            raise ValueError("A key needs its certificate: give `ssl_certfile=` too.")
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password="")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"Cannot read a certificate from {certfile} with its key from {keyfile or 'the same file'}: give PEM "
            "files that belong together, with a key that is not encrypted."
        ) from error


class Guard:
    """ASGI middleware that checks the token, the origin, the size, the duration and the rate of requests.

    A page of any website that is open in a browser on this machine can send requests to a loopback address. Therefore
    a request with an `Origin` of another host is refused. A server without a token also refuses a `Host` that is a
    name it does not know, since a website can make its own name point to this machine (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service
        self.options: ServiceOptions = service.options
        self._hosts = {name.lower() for name in self.options.allowed_hosts}
        rate = self.options.requests_per_second
        self._rate = None if rate is None else _Rate(rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse a request, or pass it on with a `receive` that enforces the limits."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}
        client = scope["client"][0] if scope.get("client") else ""
        try:
            with self.service.metrics.count_errors():
                self._check_host(headers)
                self._check_rate(client)  # before the token, so that nobody can try many tokens
                if scope["type"] == "websocket" or scope["path"] not in OPEN_PATHS:
                    self._check_token(headers)
                self._check_length(headers)
        except ServingError as error:
            await answer_error(error)(scope, receive, send)
            return
        limited = self._limit_body(receive) if scope["type"] == "http" else self._slow_down(receive, client)
        await self.app(scope, limited, send)

    def _check_host(self, headers: Mapping[bytes, str]) -> None:
        host, origin = headers.get(b"host"), headers.get(b"origin")
        if host is not None and self.options.token is None and not self._is_known(_host_name(f"//{host}")):
            raise Forbidden(
                f"This server does not know the host {host[:100]!r}. Use its IP address, start it with "
                "--allow-host NAME, or give it a token."
            )
        if origin is None or _host_and_port(origin) == (host or "").lower() or _host_name(origin) in self._hosts:
            return
        raise Forbidden(
            f"Requests from pages of {origin[:100]!r} are not allowed. Start the server with --allow-host NAME if the "
            "page is yours."
        )

    def _is_known(self, name: str | None) -> bool:
        if name is None or name == "localhost" or name in self._hosts:
            return name is not None
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _check_token(self, headers: Mapping[bytes, str]) -> None:
        if self.options.token is None:
            return
        scheme, _, token = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() not in TOKEN_SCHEMES:
            raise Unauthorized("This server needs a token: send it as `Authorization: Bearer TOKEN`.")
        if not hmac.compare_digest(token.strip().encode(), self.options.token.encode()):
            raise Unauthorized("The token is wrong. Send the token that the server was started with.")

    def _check_length(self, headers: Mapping[bytes, str]) -> None:
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length) > self.options.max_body_bytes:
            raise self._too_large()

    def _check_rate(self, client: str) -> None:
        if self._rate is not None and (seconds := self._rate.take(client)):
            raise TooManyRequests(f"This server takes at most {self._rate.rate:g} requests per second.", seconds)

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The request has more than {self.options.max_body_bytes} bytes, the limit of this server.")

    def _limit_body(self, receive: Receive) -> Receive:
        """Limit the size and the duration of a body while it arrives."""
        deadline = asyncio.get_running_loop().time() + self.options.request_seconds
        size, is_complete = 0, False

        async def read() -> Message:
            nonlocal size, is_complete
            if is_complete:  # the application waits for the client to disconnect
                return await receive()
            try:
                message = await self.service.receive(receive(), deadline)
            except TimeoutError:
                raise RequestTimeout(
                    f"The request did not arrive within {self.options.request_seconds:g} s."
                ) from None
            size += len(message.get("body", b""))
            if size > self.options.max_body_bytes:
                raise self._too_large()
            is_complete = not message.get("more_body", False)
            return message

        return read

    def _slow_down(self, receive: Receive, client: str) -> Receive:
        """Read the messages of a WebSocket no faster than the rate."""

        async def read() -> Message:
            message = await receive()
            while self._rate is not None and (seconds := self._rate.take(client)):
                await asyncio.sleep(seconds)
            return message

        return read


class _Rate:
    """Requests per second of each client, with bursts of up to one second."""

    def __init__(self, rate: float):
        self.rate = rate
        self._burst = max(1.0, rate)
        self._left: dict[str, tuple[float, float]] = {}  # client -> (requests that it may send at once, time)

    def take(self, client: str) -> float:
        """Count a request. Return 0, or the seconds after which it would be allowed."""
        now = time.monotonic()
        if len(self._left) >= MAX_CLIENTS:
            self._left = {name: last for name, last in self._left.items() if self._refill(*last, now) < self._burst}
        left = self._refill(*self._left.get(client, (self._burst, now)), now)
        if left < 1:
            return (1 - left) / self.rate
        self._left[client] = left - 1, now
        return 0.0

    def _refill(self, left: float, since: float, now: float) -> float:
        return min(self._burst, left + (now - since) * self.rate)


def _host_name(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _host_and_port(url: str) -> str | None:
    """Return the host and the port of a URL, in lower case."""
    try:
        return urlsplit(url).netloc.lower()
    except ValueError:
        return None


__all__ = [
    "OPEN_PATHS",
    "Guard",
    "check_certificate",
    "check_exposure",
    "find_addresses",
    "is_loopback",
]

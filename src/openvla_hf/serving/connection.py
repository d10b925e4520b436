"""HTTP connections with limits on what the application never sees: heads of requests, and trailers after bodies."""

from asyncio import TimerHandle, Transport

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


HEAD_SECONDS = 10.0
"""Time within which the head of a request must arrive, after the connection or its last request."""
MAX_HEAD_BYTES = 65_536


class Connection(HttpToolsProtocol):
    """A connection that is closed if the head of a request arrives too slowly, or has much more than 64 KiB.

    uvicorn waits for a head without a limit, so that a few slow clients could take all connections. Its parser in C
    also keeps a head of any size in memory, and the trailers that may follow a body. What arrives is counted until the
    parser passes on a head or a part of a body. One read of the socket may exceed the limit.
    """

    _late: TimerHandle | None = None
    _kept_bytes = 0

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        self._kept_bytes += len(data)
        super().data_received(data)
        if self._kept_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_headers_complete(self) -> None:
        """Pass on the head of a request."""
        self._kept_bytes = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Pass on a part of a body."""
        self._kept_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Pass on the end of a request."""
        self._kept_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the head of the next request, unless it is here. The rest of a refused body must come as soon."""
        super().on_response_complete()
        if self.cycle.response_complete:
            self._wait_for_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_head(self) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


__all__ = ["Connection"]

"""HTTP connections with limits on the head of a request, which the application never sees."""

from asyncio import TimerHandle, Transport

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol


HEAD_SECONDS = 10.0
"""Time within which the head of a request must arrive, after the connection or its last request."""


class Connection(H11Protocol):
    """A connection that is closed if the head of a request arrives too slowly, or has more than 64 KiB.

    uvicorn waits for a head without a limit, so that a few slow clients could take all connections. Its faster parser
    in C also takes heads of any size into memory, unlike h11.
    """

    _late: TimerHandle | None = None

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._limit_head()

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        super().data_received(data)
        self._limit_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        super().connection_lost(exc)
        self._stop_waiting()

    def _limit_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


__all__ = ["Connection"]

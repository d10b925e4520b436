"""openpi's protocol: observations and actions as msgpack over a WebSocket.

The server first sends its metadata, and then one reply to each observation, all in binary frames. Each connection is
its own session. openpi has no message for a new episode: a client that keeps its connection open sends `reset: true`
with the first observation of an episode, or a different instruction.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from .arrays import pack, unpack
from .errors import BadRequest, ServingError, ShuttingDown, TooLarge, Unprocessable
from .observation_keys import read_observation
from .policy import Observation
from .service import MILLISECONDS, Answer, Service


logger = logging.getLogger(__name__)

PROTOCOL = {"protocol": "openpi", "protocol_version": 1}
"""First entries of the metadata. The version is ours, since openpi does not number its protocol."""
RESET = "reset"
SERVER_FAULT = 1011
"""Code with which openpi's server closes a connection after an error."""


def router(service: Service) -> APIRouter:
    """Return the WebSocket at `/` and the health check `/healthz`."""
    routes = APIRouter()

    @routes.get("/healthz", response_class=PlainTextResponse, include_in_schema=False)
    async def healthz() -> str:
        return "OK\n"

    @routes.websocket("/")
    async def connect(socket: WebSocket) -> None:
        # Errors before `accept` become HTTP answers.
        with service.metrics.count_errors():
            if not service.is_ready:
                raise ShuttingDown("The server is starting or shutting down.", retry_after=1)
            session = service.open_session(is_connected=True)
        try:
            with contextlib.suppress(WebSocketDisconnect):
                await socket.accept()
                await socket.send_bytes(pack(PROTOCOL | service.policy.describe()))
                await _answer_observations(service, socket, session)
        finally:
            service.close_session(session)

    return routes


async def _answer_observations(service: Service, socket: WebSocket, session: str) -> None:
    """Answer each observation until the client leaves, or after the first error."""
    timing: dict[str, float] = {}
    # Listen while the policy predicts, so that the policy drops the observation of a client that leaves.
    incoming = asyncio.create_task(socket.receive())
    answering: asyncio.Task[Answer] | None = None
    try:
        while not _is_end(message := await incoming):
            started = time.perf_counter()
            incoming = asyncio.create_task(socket.receive())
            answering = asyncio.create_task(_answer(service, session, message))
            await asyncio.wait([answering, incoming], return_when=asyncio.FIRST_COMPLETED)
            if not answering.done() and _is_end(incoming.result()):
                return
            try:
                answer = await answering
            except ServingError as error:
                if error.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                    logger.error("%s: %s", error.kind, error.reason)
                await socket.send_text(error.reason)
                await socket.close(SERVER_FAULT, error.kind)
                return
            await socket.send_bytes(_write_reply(answer, timing | {"infer_ms": _milliseconds_since(started)}))
            timing = {"prev_total_ms": _milliseconds_since(started)}
    finally:
        incoming.cancel()
        if answering is not None:
            answering.cancel()


async def _answer(service: Service, session: str, message: Mapping[str, Any]) -> Answer:
    with service.metrics.count_errors():
        observation, is_first = await asyncio.to_thread(_read_request, service, message.get("bytes"))
    if is_first:
        service.reset_session(session)
    return await service.act(observation, session)


def _read_request(service: Service, data: bytes | None) -> tuple[Observation, bool]:
    """Return an observation, and whether it is marked as the first of an episode."""
    if data is None:
        raise BadRequest("Observations must be msgpack in binary frames, got a text frame.")
    if len(data) > service.options.max_body_bytes:
        raise TooLarge(
            f"The observation has {len(data)} bytes, and this server takes at most {service.options.max_body_bytes}."
        )
    try:
        message = unpack(data)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    observation = read_observation(message, service)
    is_first = message.get(RESET, False)
    if not isinstance(is_first, bool | np.bool):
        raise Unprocessable(f"The value of {RESET!r} must be true or false, got a {type(is_first).__name__}.")
    return observation, bool(is_first)


def _write_reply(answer: Answer, timing: dict[str, float]) -> bytes:
    """Encode the actions and the times.

    The actions are the only array, since openpi's client takes row i of every array in a reply as step i of the chunk.
    """
    return pack(
        {
            "actions": answer.actions,
            "server_timing": {**answer.timings, "batch_size": answer.batch_size, **timing},
            "policy_timing": {"infer_ms": answer.timings["model_ms"]},
        }
    )


def _is_end(message: Mapping[str, Any]) -> bool:
    return message["type"] == "websocket.disconnect"


def _milliseconds_since(started: float) -> float:
    return round((time.perf_counter() - started) * MILLISECONDS, 3)


__all__ = ["router"]

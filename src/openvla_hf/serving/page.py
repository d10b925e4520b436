"""The web page of a server, where a person asks for actions or watches an episode of the tabletop."""

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.resources import files
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from PIL import Image

from ..tabletop.scene import first_image
from .episodes import check_server
from .errors import ServingError, Unprocessable
from .policy import ONLY_CAMERA, Observation
from .service import Service


FILES = {"page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
MAX_SEED = 2**32 - 1
JPEG_QUALITY = 90


def router(service: Service) -> APIRouter:
    """Return the page at `/`, its files, and the tabletop episodes that it shows."""
    routes = APIRouter(include_in_schema=False)
    texts = files("openvla_hf.serving") / "web"

    @routes.get("/")
    async def page() -> Response:
        text = (texts / "index.html").read_text(encoding="utf-8")
        if service.options.token is not None:
            text = text.replace('data-needs-token="false"', 'data-needs-token="true"')
        return Response(text, media_type="text/html", headers=HEADERS)

    @routes.get("/page/tabletop")
    async def tabletop() -> dict[str, bool]:
        return {"is_robot": is_tabletop(service)}

    @routes.get("/page/episode")
    async def episode(seed: Annotated[int, Query(ge=0, le=MAX_SEED)]) -> Response:
        if not is_tabletop(service):
            raise Unprocessable("This server's policy is not for the tabletop's robot.")
        lines = run_episode(service, seed)
        # Answer with a status if the server has no room for another session.
        with service.metrics.count_errors():
            stream = _stream(await anext(lines), lines)
        return StreamingResponse(stream, media_type="application/x-ndjson", headers=HEADERS)

    @routes.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in FILES:
            return Response(status_code=404)
        return Response((texts / name).read_bytes(), media_type=FILES[name], headers=HEADERS)

    return routes


def is_tabletop(service: Service) -> bool:
    """Return whether the policy acts for the tabletop's robot, and Gymnasium is installed."""
    try:
        from ..tabletop.env import TabletopEnv  # noqa: F401

        check_server(service.policy.describe())
    except (ImportError, ValueError):
        return False
    return True


async def run_episode(service: Service, seed: int) -> AsyncGenerator[str, None]:
    """Run one episode in a session, as a robot does, and yield a line of JSON for each step.

    If the policy gives no action, the last line has the reason as `problem`.

    Raises:
        TooManyRequests: There are too many open sessions.
    """
    from ..tabletop.env import TabletopEnv

    policy = service.policy
    env = TabletopEnv(cameras=policy.processor.cameras, state=policy.state_dim is not None)
    session = service.open_session(is_connected=True)
    try:
        seen, info = await asyncio.to_thread(env.reset, seed=seed)
        told = {"instruction": info["instruction"]}
        step, is_over = 0, False
        yield await asyncio.to_thread(_line, seen, told | {"step": 0, "is_over": False})
        while not is_over:
            answer = await service.act(_observe(policy.processor.cameras, seen, info["instruction"]), session)
            for action in answer.actions:
                seen, _, terminated, truncated, info = await asyncio.to_thread(env.step, action)
                step, is_over = step + 1, terminated or truncated
                outcome = {"step": step, "is_over": is_over, "success": bool(info["is_success"])}
                yield await asyncio.to_thread(_line, seen, told | outcome | {"action": action.tolist()})
                if is_over:
                    break
    except ServingError as error:
        yield json.dumps({"problem": error.reason}) + "\n"
    finally:
        service.close_session(session)


async def _stream(first: str, rest: AsyncGenerator[str, None]) -> AsyncIterator[str]:
    async with contextlib.aclosing(rest):
        yield first
        async for line in rest:
            yield line


def _observe(cameras: list[str] | None, seen: Any, instruction: str) -> Observation:
    if not isinstance(seen, dict):
        return Observation({ONLY_CAMERA: seen}, instruction)
    if cameras is None:
        return Observation({ONLY_CAMERA: first_image(seen)}, instruction, seen.get("state"))
    return Observation({name: seen[name] for name in cameras}, instruction, seen.get("state"))


def _line(seen: Any, told: dict[str, Any]) -> str:
    """Return a line of JSON with the fixed camera's image."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(first_image(seen))).save(file, "JPEG", quality=JPEG_QUALITY)
    return json.dumps(told | {"image": base64.b64encode(file.getvalue()).decode()}) + "\n"


__all__ = ["is_tabletop", "router", "run_episode"]

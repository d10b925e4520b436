"""The web application of a server: every protocol over one service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from .. import __version__
from .errors import ServingError
from .service import Service


def create_app(service: Service) -> FastAPI:
    """Build the application. It starts and stops the service with itself."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(title="openvla-hf", version=__version__, lifespan=lifespan)
    app.add_exception_handler(ServingError, _answer_error)
    return app


async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServingError)
    headers = {} if error.retry_after is None else {"Retry-After": f"{error.retry_after:.0f}"}
    return JSONResponse({"error": error.kind, "reason": error.reason}, error.status, headers)


__all__ = ["create_app"]

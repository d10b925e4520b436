"""The original servers' `POST /act`, for the clients of OpenVLA and OpenVLA-OFT.

A body is JSON in which json-numpy encodes arrays, or `{"encoded": TEXT}` with such JSON as text. A policy that
predicts one action answers with its vector, and a policy that predicts chunks with a list of vectors.
"""

import asyncio
import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from .arrays import dump_json, load_json
from .errors import BadRequest, ServingError
from .observation_keys import read_observation
from .service import Answer, Service
from .v1 import ACT_ERRORS, JSON, until_gone


ENCODED = "encoded"
COMPACT = (",", ":")
ARRAY_SCHEMA = {
    "type": "object",
    "description": "An array as json-numpy encodes it.",
    "properties": {
        "__numpy__": {"type": "string", "contentEncoding": "base64"},
        "dtype": {"type": "string", "examples": ["|u1", "<f8"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
    },
    "required": ["__numpy__", "dtype", "shape"],
}
OBSERVATION_SCHEMA = {
    "type": "object",
    "description": "Images of the cameras by name, and the state if the policy sees it.",
    "properties": {
        "instruction": {"type": "string", "minLength": 1},
        "unnorm_key": {"type": ["string", "null"]},
        **dict.fromkeys(("image", "full_image", "wrist_image", "left_wrist_image", "right_wrist_image"), ARRAY_SCHEMA),
        "state": {"anyOf": [ARRAY_SCHEMA, {"type": "array", "items": {"type": "number"}}]},
    },
    "required": ["instruction"],
}
ENCODED_SCHEMA = {
    "type": "object",
    "properties": {ENCODED: {"type": "string", "contentMediaType": JSON}},
    "required": [ENCODED],
    "additionalProperties": False,
}
BODY = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": {"anyOf": [OBSERVATION_SCHEMA, ENCODED_SCHEMA]}}},
    }
}
ANSWER = {
    "description": "The action, or a list of actions from a policy that predicts chunks. It is a string if the "
    'observation was sent as a string, and "error" if the server answers errors as the original does.',
    "content": {
        JSON: {"schema": {"anyOf": [ARRAY_SCHEMA, {"type": "array", "items": ARRAY_SCHEMA}, {"type": "string"}]}}
    },
}


def router(service: Service) -> APIRouter:
    """Return the original's endpoint."""
    routes = APIRouter()

    @routes.post(
        "/act",
        response_class=Response,
        responses={**ACT_ERRORS, 200: ANSWER},
        openapi_extra=BODY,
        summary="Predict actions, as the original servers do",
    )
    async def act(request: Request) -> Response:
        """Predict the next actions from arrays in the form of json-numpy."""
        with service.metrics.count_errors():
            body = await request.body()  # an error here leaves a part unread, so the connection has to close
        try:
            with service.metrics.count_errors():
                message, is_encoded = await asyncio.to_thread(read_body, body)
                observation = await asyncio.to_thread(read_observation, message, service)
            answer = await until_gone(request, service.act(observation))
        except ServingError:
            if service.options.original_errors:
                return JSONResponse("error")
            raise
        return Response(write_answer(service, answer, is_encoded), media_type=JSON)

    return routes


def read_body(body: bytes) -> tuple[Any, bool]:
    """Read the observation, and whether it was sent as a string.

    Raises:
        BadRequest: The body is damaged.
    """
    try:
        message = load_json(body)
        if not isinstance(message, dict) or ENCODED not in message:
            return message, False
        if len(message) > 1 or not isinstance(message[ENCODED], str):
            raise BadRequest(f"A body with {ENCODED!r} must have no other key, and the value must be a string.")
        return load_json(message[ENCODED]), True
    except ValueError as error:
        raise BadRequest(str(error)) from error


def write_answer(service: Service, answer: Answer, is_encoded: bool) -> str:
    """Write the actions as the original's clients expect them."""
    actions = list(answer.actions) if service.policy.model.config.is_parallel else answer.actions[0]
    if is_encoded:
        return json.dumps(dump_json(actions))
    return dump_json(actions, COMPACT)


__all__ = ["router"]

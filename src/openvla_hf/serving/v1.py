"""The HTTP API: actions for images, sessions, and endpoints for operators."""

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from . import errors
from .arrays import check_entries
from .errors import BadRequest, ServingError, ShuttingDown, Unauthorized, Unprocessable, UnsupportedMediaType
from .images import EncodedImage, decode_base64
from .policy import Observation, Prediction
from .service import Answer, Service


MAX_CAMERAS = 16
MAX_NAME = 200
MAX_STATE = 1024
JSON, FORM = "application/json", "multipart/form-data"

Name = Annotated[str, Field(max_length=MAX_NAME)]


class ErrorBody(BaseModel):
    """Why a request failed."""

    error: str = Field(description='Kind of the error, such as "unprocessable".')
    reason: str = Field(description="Sentence that says what is wrong and what to do.")


class ActFields(BaseModel):
    """A request for actions, without its images."""

    model_config = ConfigDict(strict=True, extra="forbid")

    instruction: str = Field(description="Task of the robot.", min_length=1)
    state: list[FiniteFloat] | None = Field(
        None, description="State of the robot in its own units, if the policy sees it.", max_length=MAX_STATE
    )
    unnorm_key: Name | None = Field(None, description="Statistics to use; the server's default if left out.")
    session: Name | None = Field(None, description="Session of the robot, from `POST /v1/sessions`.")
    details: Literal["none", "chosen", "all"] = Field(
        "none",
        description='Details to add: "none", those with the probabilities of the "chosen" bins, or of "all" bins.',
    )


class ActRequest(ActFields):
    """A request for actions, with images in base64."""

    images: dict[Name, str] = Field(
        description="JPEG or PNG file of each camera, in base64.", min_length=1, max_length=MAX_CAMERAS
    )


class Timings(BaseModel):
    """Milliseconds that a request took on the server."""

    queue_ms: float = Field(description="In the queue.")
    preprocess_ms: float = Field(description="From images and text to the model's inputs.")
    model_ms: float = Field(description="In the model, for the whole batch.")
    total_ms: float = Field(description="In total, without reading the request.")


class Details(BaseModel):
    """Details of a prediction of K actions with A dimensions. Values of tokens are null with an action head."""

    predicted_actions: list[list[float]] = Field(
        description="(K, A) as predicted, before chunks are cut or averaged, and with a gripper of 1 for open."
    )
    forward_passes: int = Field(description="Passes of the language model for the batch.")
    token_ids: list[list[int]] | None = Field(description="(K, A)")
    probabilities: list[list[float]] | None = Field(description="(K, A) of the most probable bins.")
    bin_probabilities: list[list[list[float]]] | None = Field(
        description='(K, A, N) over the bins, lowest value first; null unless `details` is "all".'
    )
    entropy: list[list[float]] | None = Field(description="(K, A) in nats.")
    text: str | None = Field(description="Reasoning before the action, from a policy that writes one.")


class ActResponse(BaseModel):
    """Actions for one observation."""

    actions: list[list[float]] = Field(
        description="Actions to execute, in robot units, with the gripper in the server's convention (see `/info`)."
    )
    action_names: list[str] | None = Field(description="Names of the dimensions, if the policy knows them.")
    unnorm_key: str = Field(description="Statistics that were used.")
    batch_size: int = Field(description="Observations that were predicted together.")
    timings: Timings
    details: Details | None = None


class SessionResponse(BaseModel):
    """An open session."""

    session: str = Field(description="Id of the session.")
    expires_after_seconds: float = Field(description="Seconds without a request after which the session expires.")


class Status(BaseModel):
    """State of the server."""

    status: Literal["ok", "ready"]


class Camera(BaseModel):
    """A camera of the policy, and how its images are resized."""

    name: str
    height: int
    width: int
    resize: str
    center_crop_area: float | None


class Gripper(BaseModel):
    """Values of the gripper in actions."""

    convention: str
    open: float
    closed: float
    binary: bool


class Bounds(BaseModel):
    """1st and 99th percentiles of the actions in robot units, with a gripper of 1 for open."""

    low: list[float]
    high: list[float]


class Limits(BaseModel):
    """Largest requests that the server takes."""

    max_body_bytes: int
    max_pixels: int
    max_instruction: int


class Base(BaseModel):
    """The base of an adapter."""

    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    revision: str | None
    digest: str | None


class Info(BaseModel):
    """The policy and the server."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    server: str
    server_version: str
    engine: str = Field(description='What runs the model: "transformers" or "vllm".')
    device: str | None = Field(description='Kind of device, such as "cuda", or null with vLLM.')
    dtype: str | None = Field(description='Data type of the weights, such as "bfloat16", or null with vLLM.')
    model_id: str = Field(description="Hub id, or the name of a folder.")
    revision: str | None = Field(description="Commit on the Hub.")
    digest: str | None = Field(description="Digest of the files of a checkpoint in a folder.")
    base: Base | None = Field(description="Base of an adapter, or null for a whole checkpoint.")
    training_recorded: bool = Field(
        description="Whether the checkpoint was trained with openvla-hf, so that its processor crops as in training."
    )
    unnorm_keys: list[str]
    default_unnorm_key: str | None
    action_dim: int
    action_names: list[str] | None
    action_horizon: int = Field(description="Number of actions in an answer.")
    action_bounds: dict[str, Bounds] = Field(description="Bounds by name of the statistics.")
    action_decoding: str
    temporal_ensemble: float | None = Field(description="Decay of temporal ensembling, or null without it.")
    cameras: list[Camera]
    state_dim: int | None = Field(description="Dimensions of the state, or null if the policy does not see it.")
    gripper: Gripper
    control_frequency: float | None
    limits: Limits


def describe_errors(*kinds: type[ServingError]) -> dict[int | str, dict[str, Any]]:
    """Return the answers of an endpoint for these errors, and for those of every request."""
    everywhere: tuple[type[ServingError], ...] = (errors.Forbidden, errors.Unauthorized, errors.TooManyRequests)
    texts: dict[int | str, list[str]] = {}
    for kind in everywhere + kinds:
        texts.setdefault(kind.status, []).append(kind.__doc__ or "")
    return {
        status: {"model": ErrorBody, "description": " ".join(dict.fromkeys(found))} for status, found in texts.items()
    }


ACT_ERRORS = describe_errors(
    errors.BadRequest,
    errors.RequestTimeout,
    errors.Superseded,
    errors.SessionExpired,
    errors.TooLarge,
    errors.UnsupportedMediaType,
    errors.Unprocessable,
    errors.PredictionFailed,
    errors.Busy,
    errors.ShuttingDown,
)
SESSION_ERRORS = describe_errors(errors.SessionExpired, errors.Unprocessable)


def form_schema() -> dict[str, Any]:
    """Describe the multipart form of `POST /v1/act`: the fields, and a file for each camera."""
    schema = ActFields.model_json_schema()
    state = {"type": "string", "description": "State of the robot as a list in JSON, such as [0.1, 0.2]."}
    schema["properties"]["state"] = state
    for name in ("unnorm_key", "session"):
        schema["properties"][name] = {"type": "string", "maxLength": MAX_NAME}
    schema["additionalProperties"] = {"type": "string", "format": "binary", "description": "JPEG or PNG of a camera."}
    return schema


ACT_BODY = {
    "requestBody": {
        "required": True,
        "content": {JSON: {"schema": ActRequest.model_json_schema()}, FORM: {"schema": form_schema()}},
    }
}


def router(service: Service) -> APIRouter:
    """Return the endpoints of a service."""
    routes = APIRouter()

    @routes.post("/v1/act", responses=ACT_ERRORS, openapi_extra=ACT_BODY, summary="Predict actions")
    async def act(request: Request) -> ActResponse:
        """Predict the next actions of one robot from the images of its cameras.

        Send either JSON or a multipart form with a file for each camera, whose field has the camera's name. Pixels are
        taken as they are stored: images with an EXIF orientation, transparency or more than 8 bits are refused.
        """
        with service.metrics.count_errors():
            asked, files = await read_request(request)
            check_cameras(files, service.policy.cameras)
        images = {name: EncodedImage(data, name, service.options.max_pixels) for name, data in files.items()}
        state = None if asked.state is None else np.array(asked.state)
        observation = Observation(images, asked.instruction, state, asked.unnorm_key)
        answer = await until_gone(request, service.act(observation, asked.session))
        return describe_answer(service, answer, asked.details)

    @routes.post("/v1/sessions", status_code=201, responses=describe_errors(), summary="Open a session")
    async def open_session() -> SessionResponse:
        """Open a session for one robot, in which each action is a draft of the next one.

        A new request of a session replaces one that is still waiting. If the server averages overlapping chunks, it
        does so within a session.
        """
        with service.metrics.count_errors():
            session = service.open_session()
        return SessionResponse(session=session, expires_after_seconds=service.options.session_seconds)

    @routes.post("/v1/sessions/{session}/reset", status_code=204, responses=SESSION_ERRORS, summary="Reset a session")
    async def reset_session(session: str) -> None:
        """Start a new episode in a session."""
        with service.metrics.count_errors():
            service.reset_session(session)

    @routes.delete("/v1/sessions/{session}", status_code=204, responses=SESSION_ERRORS, summary="Close a session")
    async def close_session(session: str) -> None:
        """Forget a session."""
        with service.metrics.count_errors():
            service.close_session(session)

    add_operations(routes, service)
    return routes


def add_operations(routes: APIRouter, service: Service) -> None:
    """Add the endpoints for operators and monitoring."""

    without_token = {status: answer for status, answer in describe_errors().items() if status != Unauthorized.status}

    @routes.get("/health", responses=without_token, summary="Is the process alive?")
    async def health() -> Status:
        """Answer while the process runs. This endpoint needs no token."""
        return Status(status="ok")

    @routes.get(
        "/ready",
        responses=describe_errors(errors.Busy, errors.ShuttingDown),
        summary="Does the server take requests?",
    )
    async def ready() -> Status:
        """Answer 503 before the first prediction, during shutdown, and while vLLM does not answer."""
        if not service.is_ready:
            raise ShuttingDown("The server is starting or shutting down.", retry_after=1)
        await asyncio.to_thread(service.policy.check_health)
        return Status(status="ready")

    @routes.get("/info", responses=describe_errors(), summary="What is served?")
    async def info() -> Info:
        """Describe the policy: its cameras, state, actions, statistics and gripper."""
        options = service.options
        limits = {name: getattr(options, name) for name in Limits.model_fields}
        return Info.model_validate({**service.policy.describe(), "limits": limits})

    @routes.get(
        "/metrics",
        response_class=Response,
        responses={**describe_errors(), 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
        summary="Metrics for Prometheus",
    )
    async def metrics() -> Response:
        """Return the metrics in the text format of Prometheus."""
        return Response(service.metrics.export(), media_type=CONTENT_TYPE_LATEST)


async def read_request(request: Request) -> tuple[ActFields, dict[str, bytes]]:
    """Read a request for actions from JSON or a form, and return its fields and the images by camera.

    Raises:
        ServingError: The request can't be read, or does not have the right fields.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type == JSON:
        return await asyncio.to_thread(read_json, await request.body())
    if media_type == FORM:
        return await read_form(request)
    raise UnsupportedMediaType(f"The content type must be {JSON} or {FORM}, got {media_type[:100]!r}.")


def read_json(body: bytes) -> tuple[ActFields, dict[str, bytes]]:
    """Read a request in JSON, with images in base64."""
    try:
        check_entries(body)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    asked = validate(ActRequest.model_validate_json, body)
    return asked, {camera: decode_base64(text, camera) for camera, text in asked.images.items()}


async def read_form(request: Request) -> tuple[ActFields, dict[str, bytes]]:
    """Read a form with a file for each camera."""
    fields: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    try:
        async with request.form(max_files=MAX_CAMERAS, max_fields=len(ActFields.model_fields)) as form:
            for name, value in form.multi_items():
                if name in fields or name in files:
                    raise BadRequest(f"The form has the field {name[:100]!r} twice: send it once.")
                if isinstance(value, UploadFile):
                    files[name] = await value.read()
                else:
                    fields[name] = value
    except UnicodeError as error:
        raise BadRequest("The form's text does not match its charset.") from error
    if not files:
        raise Unprocessable("The form has no file: send the image of each camera in a field with the camera's name.")
    if "state" in fields:
        fields["state"] = validate(State.model_validate_json, f'{{"state": {fields["state"]}}}').state
    return validate(ActFields.model_validate, fields), files


class State(BaseModel):
    """The state in a form."""

    model_config = ConfigDict(strict=True, extra="forbid")

    state: list[FiniteFloat] | None


Model = TypeVar("Model")


def validate(read: Any, data: Any) -> Any:
    """Read a model from data, or raise a `ServingError` that names the first wrong field."""
    try:
        return read(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part)[:100] for part in first["loc"])
        if first["type"] == "json_invalid":
            raise BadRequest(f"{first['msg']}.") from error
        raise Unprocessable(f"{f'`{place}`: ' if place else ''}{first['msg']}.") from error


def check_cameras(files: Iterable[str], cameras: Sequence[str]) -> None:
    """Refuse images of other cameras before they are decoded, since they may be many and large."""
    for name in files:
        if name not in cameras:
            raise Unprocessable(
                f"This policy has no camera {name[:100]!r}: its cameras are {', '.join(map(repr, cameras))}."
            )


Result = TypeVar("Result")


async def until_gone(request: Request, answer: Awaitable[Result]) -> Result:
    """Wait for an answer as long as the client does.

    Raises:
        ClientDisconnect: The client has disconnected, and the answer is no longer computed.
    """
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        raise ClientDisconnect
    finally:
        answering.cancel()
        leaving.cancel()


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def describe_answer(service: Service, answer: Answer, details: str = "none") -> ActResponse:
    """Return an answer with JSON types."""
    prediction = answer.prediction
    names = service.policy.model.get_action_stats(prediction.unnorm_key).get("names")
    return ActResponse(
        actions=answer.actions.tolist(),
        action_names=None if names is None else list(names),
        unnorm_key=prediction.unnorm_key,
        batch_size=answer.batch_size,
        timings=Timings(**answer.timings),
        details=None if details == "none" else describe_prediction(prediction, with_bins=details == "all"),
    )


def describe_prediction(prediction: Prediction, with_bins: bool) -> Details:
    """Return the details of a prediction with JSON types."""
    bins = prediction.probabilities
    return Details(
        predicted_actions=prediction.actions.tolist(),
        forward_passes=prediction.forward_passes,
        token_ids=_as_list(prediction.token_ids),
        probabilities=_as_list(None if bins is None else bins.max(-1)),
        bin_probabilities=_as_list(bins) if with_bins else None,
        entropy=_as_list(prediction.entropy),
        text=prediction.text,
    )


def _as_list(values: np.ndarray | None) -> Any:
    return None if values is None else values.tolist()


__all__ = ["ErrorBody", "describe_answer", "describe_errors", "router", "until_gone"]

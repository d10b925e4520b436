"""Replicas of a policy on Ray Serve, for more robots than one server can answer.

Each replica is a whole server: a policy, its queue, its sessions and every protocol. Ray Serve starts and stops
replicas with the load, and spreads the requests over them. The id of a session begins with the id of its replica.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pydantic
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field

from .app import MAX_CONNECTIONS, create_app
from .policy import ServedPolicy
from .ray_proxy import SessionRouter
from .security import check_exposure
from .service import Service, ServiceOptions
from .token import read_token


try:
    from ray import serve
    from ray.serve.config import RequestRouterConfig
except ModuleNotFoundError as error:
    raise ImportError(
        'Replicas on Ray Serve need Ray: run `pip install "openvla-hf[ray]"`.', name=error.name
    ) from error


ANY_ADDRESS = "0.0.0.0"
"""A replica does not know the address of Ray's proxies, which may be open to everyone."""
MAX_REPLICAS = 8


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ReplicaOptions(ServiceOptions):
    """Limits of each replica, read from a configuration file."""


class Settings(BaseModel):
    """The policy that each replica serves, and how Ray Serve deploys the replicas.

    Attributes:
        model: Folder or Hub id of the policy, readable on each machine.
        revision: Branch, tag or commit of a Hub id.
        dtype: Data type of the weights.
        device: Device of a replica, such as "cuda"; the CPU by default.
        loading: Further arguments of `from_pretrained`, such as `platform`.
        compile: Whether to compile the model's passes, which takes minutes at the start.
        unnorm_key: Statistics for requests that name none.
        gripper: Values of the gripper: "policy", "binary" or "libero".
        execute: Actions of a chunk in an answer; all by default.
        ensemble: Decay with which overlapping chunks of a session are averaged.
        control_frequency: Rate in Hz at which robots should act, reported to clients.
        token_file: File on each machine with the token that clients must send. By default, the token is that of the
            variable OPENVLA_HF_SERVER_TOKEN.
        no_token: Whether everyone who can reach the server may command the robot.
        options: Fields of `ServiceOptions`, except for the token. Limits hold for each replica.
        deployment: Arguments of `serve.deployment`, such as `num_replicas`, `autoscaling_config` and
            `ray_actor_options`. By default, a replica on a GPU gets a whole one.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    revision: str | None = None
    dtype: str = "auto"
    device: str | None = None
    loading: Mapping[str, Any] = Field(default_factory=dict)
    compile: bool = False
    unnorm_key: str | None = None
    gripper: str = "policy"
    execute: int | None = None
    ensemble: float | None = None
    control_frequency: float | None = None
    token_file: str | None = None
    no_token: bool = False
    options: ReplicaOptions = ReplicaOptions()
    deployment: Mapping[str, Any] = Field(default_factory=dict)


def app(settings: Settings) -> serve.Application:
    """Build the application for `serve.run`, or for `serve run` with `openvla_hf.serving.ray:app` and settings.

    Raises:
        ValueError: The settings contain the token itself, which Ray would show in its dashboard.
    """
    if settings.options.token is not None:
        raise ValueError("Ray shows settings in its dashboard: give the token with `token_file` instead of `options`.")

    def build() -> FastAPI:
        return create_app(load_service(settings, serve.get_replica_context().replica_id.unique_id))

    return serve.deployment(serve.ingress(build)(), **deployment_arguments(settings)).bind()


def deployment_arguments(settings: Settings) -> dict[str, Any]:
    """Return the arguments of `serve.deployment`.

    By default, Ray Serve runs 1 to 8 replicas, and aims at one full batch of requests for each replica.
    """
    arguments = {
        "name": "Policy",
        "max_ongoing_requests": MAX_CONNECTIONS,  # the queue of the replica has its own limit
        "request_router_config": RequestRouterConfig(request_router_class=SessionRouter),
        "ray_actor_options": {"num_gpus": int((settings.device or "cpu").startswith("cuda"))},
        **settings.deployment,
    }
    if "num_replicas" not in arguments:
        arguments.setdefault(
            "autoscaling_config",
            {"max_replicas": MAX_REPLICAS, "target_ongoing_requests": settings.options.max_batch},
        )
    return arguments


def load_service(settings: Settings, replica_id: str) -> Service:
    """Load the service of one replica.

    Raises:
        ValueError: A setting does not fit the policy, or there is no token.
        OSError: The policy or the token can't be read.
    """
    token = read_token(settings.token_file)
    check_exposure(ANY_ADDRESS, token, settings.no_token)
    policy = ServedPolicy.load(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        loading=settings.loading,
        unnorm_key=settings.unnorm_key,
        gripper=settings.gripper,
        execute=settings.execute,
        ensemble=settings.ensemble,
        control_frequency=settings.control_frequency,
    )
    if settings.compile:
        policy.model.compile_for_actions()
    return Service(policy, replace(settings.options, token=token), session_prefix=f"{replica_id}.")


__all__ = ["ReplicaOptions", "Settings", "app", "deployment_arguments", "load_service"]

"""Serve a policy to robots over HTTP and WebSocket."""

import argparse
import contextlib
import shlex
import signal
import socket
from typing import TYPE_CHECKING, Any

from ..serving.token import TOKEN_VARIABLE, read_token
from .common import (
    DTYPES,
    add_oft_options,
    checkpoint,
    console,
    default_model,
    device_map,
    file,
    natural,
    positive,
    print_json,
    weight,
)


if TYPE_CHECKING:
    from ..serving.policy import ServedPolicy

EXAMPLE = "serve openvla/openvla-7b --unnorm-key bridge_orig --dtype bfloat16 --device cuda"
GRIPPERS = ("policy", "binary", "libero")
# Engine -> options that only the other engine has.
OTHER_ENGINES_OPTIONS = {
    "transformers": ("vllm_python", "vllm_url", "vllm_args"),
    "vllm": ("platform", "action_decoding", "device", "compile"),
}
DOORS = {
    "page to try the policy": "{http}/",
    "HTTP API": "POST {http}/v1/act (described in {http}/openapi.json)",
    "openpi clients": "{ws}",
    "original clients": "POST {http}/act",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        type=checkpoint,
        help="folder or Hub id of the policy (default: the tabletop policy that ships with the package)",
    )
    add_policy_options(parser.add_argument_group("policy"))
    add_engine_options(parser.add_argument_group("engine"))
    add_action_options(parser.add_argument_group("actions"))
    add_network_options(parser.add_argument_group("network"))
    add_limits(parser.add_argument_group("batches and limits"))


def add_policy_options(group: Any) -> None:
    """Add the options that say how the policy is loaded."""
    add_oft_options(group)
    group.add_argument("--revision", help="branch, tag or commit of a Hub id (default: main)")
    group.add_argument("--dtype", default="auto", choices=DTYPES, help="data type (default: that of the checkpoint)")
    group.add_argument(
        "--device", type=device_map, help="device such as cuda, or auto to choose one (default: the CPU)"
    )
    group.add_argument(
        "--compile", action="store_true", help="compile the model's passes, which takes minutes at the start"
    )


def add_engine_options(group: Any) -> None:
    """Add the options that say what runs the model."""
    group.add_argument(
        "--engine",
        default="transformers",
        choices=list(OTHER_ENGINES_OPTIONS),
        help="what runs the model: transformers in this process, or vLLM in one of its own (default: %(default)s)",
    )
    group.add_argument(
        "--vllm-python", metavar="PYTHON", help="Python of an environment with vLLM, to start vLLM with"
    )
    group.add_argument("--vllm-url", metavar="URL", help="address of a vLLM server that is already running")
    group.add_argument(
        "--vllm-args",
        type=shlex.split,
        default=[],
        metavar="ARGS",
        help="further arguments for starting vLLM, as in --vllm-args='--gpu-memory-utilization 0.5'",
    )


def add_action_options(group: Any) -> None:
    """Add the options that say which actions robots receive."""
    group.add_argument("--unnorm-key", help="statistics for requests that name none")
    group.add_argument(
        "--gripper",
        default="policy",
        choices=GRIPPERS,
        help="values of the gripper: as predicted (1 open, 0 closed), rounded to 1 or 0 (binary), or -1 open and "
        "1 closed (libero) (default: %(default)s)",
    )
    group.add_argument("--execute", type=positive, metavar="N", help="actions of a chunk in an answer (default: all)")
    group.add_argument(
        "--ensemble",
        type=float,
        metavar="DECAY",
        help="average overlapping chunks of a session with this decay, and answer with one action",
    )
    group.add_argument(
        "--control-frequency", type=weight, metavar="HZ", help="rate at which robots should act, reported to clients"
    )
    group.add_argument(
        "--camera",
        action="append",
        type=camera_key,
        default=[],
        metavar="CAMERA=KEY",
        help="key under which clients send the image of one of the policy's cameras; may be repeated",
    )


def add_network_options(group: Any) -> None:
    """Add the options for the address of the server and for access to it."""
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    group.add_argument("--port", type=natural, default=8000, help="port; 0 for any (default: %(default)s)")
    group.add_argument(
        "--token-file",
        type=file,
        metavar="FILE",
        help=f"file with the token that clients must send (default: the variable {TOKEN_VARIABLE})",
    )
    group.add_argument(
        "--no-token", action="store_true", help="let everyone who can reach the server command the robot"
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="name under which clients reach the server, besides localhost and IP addresses; may be repeated",
    )
    group.add_argument("--ssl-certfile", type=file, metavar="FILE", help="certificate for HTTPS")
    group.add_argument("--ssl-keyfile", type=file, metavar="FILE", help="key of the certificate, if it is separate")
    group.add_argument(
        "--original-errors",
        action="store_true",
        help='answer errors of POST /act as the original server does, with "error" and status 200',
    )


def add_limits(group: Any) -> None:
    """Add the options for batches and for the limits of requests."""
    group.add_argument(
        "--max-batch",
        type=positive,
        default=8,
        metavar="N",
        help="largest number of observations in a batch (default: %(default)s)",
    )
    group.add_argument(
        "--max-wait-ms",
        type=float,
        default=5.0,
        metavar="MS",
        help="longest time that a batch waits for other active robots (default: %(default)s)",
    )
    group.add_argument(
        "--max-queue",
        type=positive,
        default=64,
        metavar="N",
        help="largest number of waiting requests (default: %(default)s)",
    )
    group.add_argument(
        "--max-sessions",
        type=positive,
        default=256,
        metavar="N",
        help="largest number of open sessions (default: %(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=positive,
        metavar="N",
        default=4096 * 4096,
        help="largest number of pixels of an image (default: %(default)s)",
    )
    group.add_argument(
        "--max-rate",
        type=weight,
        metavar="HZ",
        help="largest rate of requests of a client, per second (default: no limit)",
    )


def camera_key(text: str) -> tuple[str, str]:
    """Parse `CAMERA=KEY`."""
    camera, _, key = text.partition("=")
    if not (camera and key):
        raise argparse.ArgumentTypeError(f"must be CAMERA=KEY, got {text!r}")
    return camera, key


def run(args: argparse.Namespace) -> None:
    import_server()
    from transformers.utils import logging

    from ..serving.app import listen, run_server
    from ..serving.security import check_certificate, check_exposure
    from ..serving.service import Service, ServiceOptions

    logging.disable_progress_bar()
    options = ServiceOptions(
        max_batch=args.max_batch,
        max_wait_ms=args.max_wait_ms,
        max_queue=args.max_queue,
        max_sessions=args.max_sessions,
        max_pixels=args.max_pixels,
        requests_per_second=args.max_rate,
        token=read_token(args.token_file),
        allowed_hosts=args.allow_host,
        original_errors=args.original_errors,
        camera_keys=dict(args.camera),
    )
    check_exposure(args.host, options.token, args.no_token)
    check_certificate(args.ssl_certfile, args.ssl_keyfile)
    reserved = listen(args.host, args.port)
    with contextlib.ExitStack() as opened:
        status = opened.enter_context(console(stderr=True, quiet=args.json).status("loading"))
        policy = opened.enter_context(open_policy(args))
        status.update("predicting once")

        def say_ready() -> None:
            status.stop()
            show_ready(args, policy.describe(), reserved)

        run_server(
            Service(policy, options),
            reserved,
            ssl_certfile=args.ssl_certfile,
            ssl_keyfile=args.ssl_keyfile,
            on_ready=say_ready,
        )


def open_policy(args: argparse.Namespace) -> "contextlib.AbstractContextManager[ServedPolicy]":
    """Load the policy into this process, or start vLLM.

    Raises:
        ValueError: Options do not fit the engine, or do not fit the checkpoint.
    """
    from ..serving.policy import ServedPolicy

    for name in OTHER_ENGINES_OPTIONS[args.engine]:
        if getattr(args, name):
            raise ValueError(f"`{name}` has no effect with --engine {args.engine}: leave it out.")
    options = {
        "revision": args.revision,
        "dtype": args.dtype,
        "unnorm_key": args.unnorm_key,
        "gripper": args.gripper,
        "execute": args.execute,
        "ensemble": args.ensemble,
        "control_frequency": args.control_frequency,
    }
    model = args.model or default_model()
    if args.engine == "vllm":
        from ..serving import vllm

        signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that vLLM is stopped too
        return vllm.open_policy(
            model, vllm_python=args.vllm_python, vllm_url=args.vllm_url, vllm_args=args.vllm_args, **options
        )
    loading = {"platform": args.platform, "action_decoding": args.action_decoding}
    loading = {name: value for name, value in loading.items() if value is not None}
    policy = ServedPolicy.load(model, device=args.device, loading=loading, **options)
    if args.compile:
        policy.model.compile_for_actions()
    return contextlib.nullcontext(policy)


def import_server() -> None:
    """Import what the server needs.

    Raises:
        ImportError: The extra is not installed.
    """
    from ..data.optional_packages import import_extra

    web = ("fastapi", "uvicorn", "httptools", "websockets", "python_multipart")
    for module in (*web, "msgpack", "prometheus_client"):
        import_extra(module, "serve")


def show_ready(args: argparse.Namespace, description: dict[str, Any], reserved: socket.socket) -> None:
    """Print the address of the server and what it serves."""
    host, port = reserved.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    secure = "s" if args.ssl_certfile else ""
    url = f"http{secure}://{address}"
    if args.json:
        print_json({"url": url, "websocket": f"ws{secure}://{address}", **description})
        return
    out = console()
    out.print(f"Ready: {description['model_id']} at {url}")
    for name, text in DOORS.items():
        out.print(f"  {name}: {text.format(http=url, ws=f'ws{secure}://{address}')}")
    out.print(f"  cameras: {', '.join(camera['name'] for camera in description['cameras'])}")
    if description["state_dim"] is not None:
        out.print(f"  state: {description['state_dim']} dimensions")
    keys = description["unnorm_keys"]
    default = description["default_unnorm_key"]
    out.print(f"  statistics: {default or 'named by each request, one of ' + ', '.join(keys)}")
    gripper = description["gripper"]
    out.print(f"  gripper: {gripper['open']:g} open, {gripper['closed']:g} closed ({gripper['convention']})")
    out.print("Ctrl-C stops the server.")

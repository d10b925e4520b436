import asyncio
import contextlib
import threading
from pathlib import Path

import numpy as np
import pytest


INSTRUCTION = "pick up the red block"


@pytest.fixture(scope="module", autouse=True)
def one_certificate():
    """Let each client load one certificate, instead of all public ones: that takes 30 ms, also for plain HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(Path(__file__).with_name("localhost.pem")))
        yield


def random_weights(config):
    """A model whose answers differ between images, instructions and drafts."""
    import torch

    from openvla_hf import OpenVLAForActionPrediction

    torch.manual_seed(0)
    model = OpenVLAForActionPrediction(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model


@pytest.fixture(scope="session")
def plain_policy():
    """A tiny OpenVLA with two keys, of which "tiny" is the default."""
    from openvla_hf.serving.policy import ServedPolicy
    from openvla_hf.testing import BRIDGE_LIKE_STATS, tiny_config, tiny_processor

    half = BRIDGE_LIKE_STATS | {name: [value / 2 for value in BRIDGE_LIKE_STATS[name]] for name in ("q01", "q99")}
    config = tiny_config(norm_stats={"tiny": {"action": BRIDGE_LIKE_STATS}, "half": {"action": half}})
    return ServedPolicy(random_weights(config), tiny_processor(config=config), "tiny/plain", unnorm_key="tiny")


@pytest.fixture(scope="session")
def chunk_policy(tmp_path_factory):
    """A tiny OpenVLA-OFT with LIBERO's two cameras and state, which predicts chunks of 8 actions."""
    from openvla_hf.serving.policy import ServedPolicy
    from openvla_hf.testing import write_tiny_oft

    folder = write_tiny_oft(tmp_path_factory.mktemp("served") / "oft", platform="libero")
    return ServedPolicy.load(str(folder))


@pytest.fixture(scope="session")
def make_observation():
    """Makes the observation of a robot at a step, all different."""
    from openvla_hf.serving.policy import Observation

    def make(policy, seed=0, **fields):
        rng = np.random.default_rng(seed)
        images = {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in policy.cameras}
        state = None if policy.state_dim is None else rng.normal(size=policy.state_dim)
        return Observation(images, INSTRUCTION, state, **fields)

    return make


@contextlib.contextmanager
def running_server(app, port=0):
    """Serve an application on a port of the loopback interface, free by default, in a thread, and give its URL."""
    import uvicorn

    from openvla_hf.serving.connection import Connection

    class Server(uvicorn.Server):
        """A server that ends at once, where uvicorn's looks ten times a second whether to end."""

        async def main_loop(self):
            await self.on_tick(0)  # sets the date of the answers
            await asyncio.to_thread(ending.wait)

    ending = threading.Event()
    server = Server(uvicorn.Config(app, http=Connection, port=port, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("The server did not start.")
        thread.join(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        ending.set()
        thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve():
    """Starts a server of a policy with the options of `ServiceOptions`, as a context manager that gives the URL."""
    from openvla_hf.serving.app import create_app
    from openvla_hf.serving.service import Service, ServiceOptions

    def start(policy, port=0, **options):
        return running_server(create_app(Service(policy, ServiceOptions(**options))), port)

    return start

from pathlib import Path

import numpy as np
import pytest
from running import INSTRUCTION, random_weights, running_server


@pytest.fixture(scope="module", autouse=True)
def one_certificate():
    """Let each client load one certificate, instead of all public ones: that takes 30 ms, also for plain HTTP."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(Path(__file__).with_name("localhost.pem")))
        yield


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


@pytest.fixture(scope="session")
def serve():
    """Starts a server of a policy with the options of `ServiceOptions`, as a context manager that gives the URL."""
    from openvla_hf.serving.app import create_app
    from openvla_hf.serving.service import Service, ServiceOptions

    def start(policy, port=0, **options):
        return running_server(create_app(Service(policy, ServiceOptions(**options))), port)

    return start

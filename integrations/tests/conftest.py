import json

import pytest

from openvla_hf.modeling.checkpoint_files import STATISTICS_FILE
from openvla_hf.testing import write_tiny_oft


@pytest.fixture(scope="session")
def oft(tmp_path_factory):
    """A tiny OpenVLA-OFT with LIBERO's two cameras and state, which predicts chunks of 8 actions."""
    folder = write_tiny_oft(tmp_path_factory.mktemp("oft") / "oft", platform="libero")
    statistics = json.loads((folder / STATISTICS_FILE).read_text())
    for name in ("q01", "min", "q99", "max"):  # a gripper between closed and open
        statistics["tiny"]["action"][name][-1] = float(name in ("q99", "max"))
    (folder / STATISTICS_FILE).write_text(json.dumps(statistics))
    return folder

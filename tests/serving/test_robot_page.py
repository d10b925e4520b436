"""The page on a robot's control loop: its blocks run against a real server."""

import numpy as np
import pytest
from pages import ROOT, walk
from PIL import Image

from openvla_hf.serving import ServerError, UnsafeAction
from openvla_hf.serving.policy import ServedPolicy


RATE = 200.0
# The server of the test is near and fast, but its machine may be busy.
SMALLER = {"RATE = 5.0": f"RATE = {RATE}", "timeout=1.0": "timeout=30.0", "steps=60": "steps=4"}


@pytest.fixture
def page(serve, plain_policy, tmp_path, monkeypatch):
    """The names that the page defines, with the server that its loop has acted with."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), "navy").save("frame.png")
    (tmp_path / "token.txt").write_text("secret\n")
    monkeypatch.setitem(plain_policy.model.norm_stats, "bridge_orig", plain_policy.model.norm_stats["tiny"])
    policy = ServedPolicy(
        plain_policy.model,
        plain_policy.processor,
        unnorm_key="bridge_orig",
        gripper="binary",
        control_frequency=RATE,
    )
    with serve(policy, token="secret") as url:
        names = walk(ROOT / "docs/robot.md", lambda arguments: None, SMALLER | {"http://gpu-server:8000": url}).names
        yield names
        names["client"].close()


class Watched:
    """A robot that notes what it is told."""

    def __init__(self, robot):
        robot.home()
        self.robot, self.moves, self.stops = robot, [], 0

    def __getattr__(self, name):
        return getattr(self.robot, name)

    def move(self, action):
        self.moves.append(action)
        self.robot.move(action)

    def stop(self):
        self.stops += 1


def test_the_blocks_of_the_page_make_a_loop_that_keeps_its_limits_and_stops(page, monkeypatch):
    assert page["client"].round_trip.count == 8
    robot = Watched(page["PretendRobot"]())
    with page["client"].session() as session:
        page["run_episode"](session, robot, "pick up the red block")
        assert (len(robot.moves), robot.stops) == (4, 1)
        assert {action[6] for action in robot.moves} <= {0.0, 1.0}
        lengths = [np.linalg.norm(action[:3]) for action in robot.moves]
        assert max(lengths) <= page["limits"].max_translation + 1e-9

        robot.robot.xyz = np.array([0.3, 0.0, -0.1])
        with pytest.raises(UnsafeAction, match="outside the workspace"):
            page["run_episode"](session, robot, "pick up the red block")
        robot.home()
        monkeypatch.setattr(page["client"], "timeout", 1e-6)
        with pytest.raises(ServerError, match="gave no answer within"):
            page["run_episode"](session, robot, "pick up the red block")
    assert (len(robot.moves), robot.stops) == (4, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"gripper": {"open": -1.0, "closed": 1.0}},
        {"cameras": [{"name": "full_image"}]},
        {"state_dim": 8},
        {"control_frequency": 20.0},
    ],
)
def test_the_page_refuses_a_server_with_other_conventions(page, changes):
    with pytest.raises(ValueError, match="This robot"):
        page["check_conventions"](page["client"].info | changes)

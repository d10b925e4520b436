"""vla-eval, unmodified, evaluates policies of this package. `make test-integrations` runs these tests."""

import contextlib
import itertools
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import anyio
import numpy as np
import pytest
from vla_eval import api
from vla_eval.benchmarks.base import StepBenchmark, StepResult
from vla_eval.connection import Connection

from openvla_hf.serving.policy import Observation, ServedPolicy
from openvla_hf.serving.vla_eval_server import OpenVLAModelServer
from openvla_hf.tabletop.rollouts import FIRST_UNSEEN_SEED, TABLETOP_POLICY, run_episodes


VLA_EVAL = Path(sys.executable).parent / "vla-eval"
FEW = ("--benchmark-field", "episodes_per_task=1")
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
INSTRUCTION = "open the drawer"
START_SECONDS = 120


@pytest.fixture(scope="module")
def policy():
    return ServedPolicy.load(str(TABLETOP_POLICY))


@contextlib.contextmanager
def started(*command):
    """Start a model server as a process and give its address."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)])
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert process.poll() is None, "the server stopped"
            with contextlib.suppress(urllib.error.URLError):
                if urllib.request.urlopen(f"http://127.0.0.1:{port}/health").status == 200:
                    break
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)
        yield f"ws://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def titled_block(title):
    """Return a file that the page shows."""
    return re.search(rf'^```\w+ title="{title}"\n(.*?)^```$', PAGE.read_text(), re.DOTALL | re.MULTILINE)[1]


def direct_steps(policy, task, episodes):
    """Steps of the same episodes without vla-eval."""

    def act(observations, instructions):
        seen = [Observation({"image": one}, text) for one, text in zip(observations, instructions, strict=True)]
        return np.stack([one.actions[0] for one in policy.predict([policy.prepare(each) for each in seen])])

    rollouts = run_episodes(act, range(FIRST_UNSEEN_SEED, FIRST_UNSEEN_SEED + episodes), tasks=[task], batch_size=1)
    return [(rollout.steps, rollout.success) for rollout in rollouts]


def steps_of(results):
    (result,) = results
    return {
        task["task"]: [(one["steps"], one["metrics"]["success"]) for one in task["episodes"]]
        for task in result["tasks"]
    }


@pytest.mark.parametrize("kind", ["module", "script"])
def test_vla_eval_runs_the_episodes_that_the_policy_runs_without_it(kind, policy, tmp_path):
    for title in ("openvla_server.py", "tabletop.yaml"):
        (tmp_path / title).write_text(titled_block(title))
    module = ["-m", "openvla_hf.serving.vla_eval_server"]
    command = module if kind == "module" else [str(tmp_path / "openvla_server.py")]
    with started(*command) as url:
        subprocess.run(
            [VLA_EVAL, "run", "-c", "tabletop.yaml", "--no-docker", "--server-url", url, *FEW],
            cwd=tmp_path,
            check=True,
        )
    (written,) = tmp_path.glob("results/*_aggregate.json")
    found = steps_of([json.loads(written.read_text())])
    assert found == {task: direct_steps(policy, task, 1) for task in ("put", "push")}
    assert found["put"][0][1]
    assert found["push"][0][1]


class Drawer(StepBenchmark):
    """Sends LIBERO's observations and records the actions."""

    played: list

    def __init__(self, send_wrist_image=False, send_state=False, quat_no_antipodal=False):
        super().__init__()
        # The server asks for all that the policy sees.
        assert (send_wrist_image, send_state, quat_no_antipodal) == (True, True, True)
        Drawer.played = []

    def get_tasks(self):
        return [{"name": "drawer"}]

    def reset(self, task):
        self.count = 0
        return observation(0)

    def step(self, action):
        self.count += 1
        self.played.append(action["actions"])
        return StepResult(observation(self.count), 0.0, self.count == 12, {})

    def make_obs(self, raw_obs, task):
        return raw_obs

    def get_step_result(self, step_result):
        return {"success": True}


def observation(seed):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (48, 64, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    return {"images": images, "task_description": INSTRUCTION, "states": rng.normal(size=8)}


def test_chunks_are_played_to_their_end_with_the_gripper_of_libero(oft):
    server = OpenVLAModelServer(str(oft), gripper="libero")
    config = {"benchmarks": [{"benchmark": f"{__name__}:Drawer", "episodes_per_task": 1, "max_steps": 20}]}
    api.evaluate(server, config, no_save=True)

    policy, expected = ServedPolicy.load(str(oft), gripper="libero"), []
    for step in (0, 8):
        sent = observation(step)
        images = {"full_image": sent["images"]["agentview"], "wrist_image": sent["images"]["wrist"]}
        session = policy.open_session()
        (prediction,) = policy.predict([policy.prepare(Observation(images, INSTRUCTION, sent["states"]))])
        expected.extend(session.receive(prediction))
    np.testing.assert_allclose(Drawer.played, expected[:12], rtol=1e-6)
    assert {action[-1] for action in Drawer.played} <= {-1.0, 1.0}


def test_environments_that_act_at_the_same_time_share_a_batch_but_not_a_session(policy):
    server = OpenVLAModelServer(max_wait_time=5.0, max_batch_size=2)
    sizes = []
    predict = server.policy.predict
    server.policy.predict = lambda prepared: sizes.append(len(prepared)) or predict(prepared)
    frames = [[np.full((224, 224, 3), level, np.uint8) for level in levels] for levels in ((0, 60), (120, 180))]
    texts = ["put the red cube on the green plate", "push the blue ball to the left"]
    answers = [[], []]

    async def act(url, robot):
        async with Connection(url) as connection:
            await connection.start_episode({"task": {}})
            for frame in frames[robot]:
                sent = {"images": {"image": frame}, "task_description": texts[robot]}
                answers[robot].append((await connection.act(sent))["actions"])
            await connection.end_episode({})

    async def act_together(url):
        async with anyio.create_task_group() as group:
            for robot in range(2):
                group.start_soon(act, url, robot)

    with api.serve_background(server) as handle:
        anyio.run(act_together, handle.url)
    assert (sum(sizes), max(sizes)) == (4, 2)  # the first observation does not wait
    assert not server._sessions
    for robot, step in itertools.product(range(2), range(2)):
        (alone,) = policy.predict([policy.prepare(Observation({"image": frames[robot][step]}, texts[robot]))])
        np.testing.assert_allclose(answers[robot][step], alone.actions[0], atol=1e-4)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"images": {"agentview": observation(0)["images"]["agentview"]}}, "no image for .* camera 'wrist_image'"),
        ({"states": None}, "no state, but the policy needs one of 8 dimensions"),
        ({"task_description": ""}, "no 'task_description'"),
    ],
)
def test_an_observation_that_lacks_something_is_an_error_for_the_benchmark(oft, missing, message):
    async def act(url):
        async with Connection(url) as connection:
            await connection.start_episode({"task": {}})
            await connection.act(observation(0) | missing)

    with api.serve_background(OpenVLAModelServer(str(oft))) as handle, pytest.raises(RuntimeError, match=message):
        anyio.run(act, handle.url)


def test_cameras_can_be_named(oft):
    server = OpenVLAModelServer(str(oft), cameras={"full_image": "top"})
    sent = observation(0)
    sent["images"]["top"] = sent["images"].pop("agentview")
    assert server.read(sent).images["full_image"] is sent["images"]["top"]
    with pytest.raises(ValueError, match="no camera 'left'"):
        OpenVLAModelServer(str(oft), cameras={"left": "top"})


def test_the_spec_of_the_actions_follows_the_gripper(oft):
    libero = OpenVLAModelServer(str(oft), gripper="libero").get_action_spec()
    assert libero["gripper"].format == "binary_close_positive"
    assert OpenVLAModelServer(str(oft)).get_action_spec()["gripper"].range == (0, 1)
    with pytest.raises(ValueError, match="Unknown rotation 'quaternion'"):
        OpenVLAModelServer(rotation="quaternion")

"""LIBERO as suites. The tests of the simulation run where LIBERO is installed; see CONTRIBUTING.md."""

from dataclasses import asdict

import numpy as np
import pytest
from PIL import Image

from openvla_hf.suites.libero import LIBERO_SUITES, WAIT, libero_suite
from openvla_hf.suites.simulator import Simulator
from openvla_hf.suites.suite import Episode


# Suite -> tasks, and steps after which OpenVLA's and OpenVLA-OFT's evaluations end an episode.
PUBLISHED = {
    "libero_spatial": (10, 220),
    "libero_object": (10, 280),
    "libero_goal": (10, 300),
    "libero_10": (10, 520),
    "libero_90": (90, 400),
}
TASK = "0"  # of libero_goal: a cabinet, a stove and a rack, whose places are drawn
EPISODES = 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_protocol_of_each_suite_is_the_published_one(name):
    tasks, steps = PUBLISHED[name]
    suite = libero_suite(name)
    protocol = asdict(suite.protocol)
    assert protocol.pop("initial_states").startswith("LIBERO's .pruned_init files: episode i has state i")
    assert protocol == {
        "episodes": 50,
        "first_seed": 0,
        "max_steps": steps,
        "success": "the environment reports success at any step, which ends the episode",
        "cameras": ("full_image", "wrist_image"),
        "image_size": 256,
        "rotate": True,
        "jpeg": True,
        "resize": 224,
        "crop_area": 0.9,
        "settle_steps": 10,
        "settle_action": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0),
        "gripper": "libero",
        "execute": None,
    }
    assert set(LIBERO_SUITES) == set(PUBLISHED)
    assert suite.environments == tuple(map(str, range(tasks)))
    assert suite.state_dim == 8
    assert [episode.seed for episode in suite.episodes()] == [*range(50)] * tasks


def test_the_policy_sees_the_originals_rotation_jpeg_and_resize(recordings):
    folder = recordings("oft-image") / "images"
    # PNG in the full recordings, and WebP without loss and with every 16th row of the result here.
    camera, resized = (np.asarray(Image.open(next(folder.glob(f"5.{name}.*")))) for name in ("raw", "resized"))
    state = np.ones(8, np.float32)
    # The recording begins after the rotation.
    seen = libero_suite("libero_goal").show({"full_image": camera[::-1, ::-1], "wrist_image": camera, "state": state})
    np.testing.assert_array_equal(seen["full_image"][:: 224 // len(resized)], resized)
    assert seen["wrist_image"].shape == (224, 224, 3)
    assert not np.array_equal(seen["wrist_image"], seen["full_image"])
    np.testing.assert_array_equal(seen["state"], state)


@pytest.fixture(scope="module")
def suite(libero):
    return libero_suite("libero_goal")


@pytest.fixture(scope="module")
def env(suite):
    env = suite.make(TASK)
    yield env
    env.close()


def places(problem):
    """Return the poses of the fixtures, which belong to the model, and the state of everything that moves."""
    model, data = problem.sim.model, problem.sim.data
    bodies = [model.body_name2id(fixture.root_body) for fixture in problem.fixtures]
    return np.concatenate([model.body_pos[bodies].ravel(), model.body_quat[bodies].ravel()]), data.qpos.copy()


@pytest.fixture(scope="module")
def in_order(env):
    """The first episodes, one after the other: their observations and places."""
    return [(env.reset(seed=seed)[0], *places(env.problem)) for seed in range(EPISODES)]


def check_same(observation, problem, expected):
    """Assert that an episode begins as expected, to the pixel."""
    seen, fixtures, moving = expected
    for found, wanted in zip(places(problem), (fixtures, moving), strict=True):
        np.testing.assert_array_equal(found, wanted)
    for name, value in observation.items():
        np.testing.assert_array_equal(value, seen[name], err_msg=name)


def test_episodes_have_the_places_of_an_environment_that_is_seeded_once(libero, env, in_order):
    """As in OpenVLA's evaluation: one seed for the task, and a reset and an initial state for each episode."""
    original = libero.ControlEnv(bddl_file_name=env._file, has_offscreen_renderer=False, use_camera_obs=False)
    original.seed(0)
    for number, (_, *expected) in enumerate(in_order):
        original.reset()
        original.set_init_state(env._states[number])
        for found, wanted in zip(places(original.env), expected, strict=True):
            np.testing.assert_array_equal(found, wanted)
    drawn = [fixtures for _, fixtures, _ in in_order]
    assert all(np.abs(drawn[0] - other).max() > 1e-3 for other in drawn[1:])


def test_an_episode_is_the_same_alone_and_in_any_order(suite, env, in_order):
    other = suite.make(TASK)
    np.random.seed(1)
    last = EPISODES - 1
    check_same(other.reset(seed=last)[0], other.problem, in_order[last])  # without the earlier ones
    check_same(env.reset(seed=1)[0], env.problem, in_order[1])  # an earlier one again
    assert np.random.random() == np.random.RandomState(1).random()  # the caller's draws are unaffected
    other.close()


def test_an_environment_renders_the_same_beside_one_with_other_objects_and_after_that_one_closes(env):
    action = np.array([0.5, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])
    env.reset(seed=0)
    alone = [env.step(action)[0] for _ in range(2)]
    other = libero_suite("libero_10").make("2")
    env.reset(seed=0)
    other.reset(seed=0)
    seen = [env.step(action)[0]]
    assert np.abs(other.step(action)[0]["full_image"].astype(float) - seen[0]["full_image"]).mean() > 10
    other.close()
    seen.append(env.step(action)[0])
    for one, two in zip(alone, seen, strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(two[name], value, err_msg=name)


def test_the_policy_first_sees_both_cameras_after_the_scene_has_settled(suite, env):
    simulator = Simulator(suite)
    simulator.start(Episode(TASK, 2))
    view = simulator.view()
    simulator.close()
    start, _ = env.reset(seed=2)
    for _ in range(10):
        observation, *_ = env.step(np.array(WAIT))
    assert view.instruction == "open the middle drawer of the cabinet"
    for name in ("full_image", "wrist_image"):
        assert observation[name].shape == (256, 256, 3)
        assert 40 < observation[name].mean() < 220
        assert not np.array_equal(observation[name], start[name])
        np.testing.assert_array_equal(view.observation[name], suite.show(observation)[name])
    np.testing.assert_array_equal(view.observation["state"], observation["state"])


def test_the_state_has_the_pose_and_the_fingers_as_robosuite_gives_them(env):
    from robosuite.utils.transform_utils import quat2axisangle

    observation, _ = env.reset(seed=0)
    raw = env.problem.observation_spec()
    state = [raw["robot0_eef_pos"], quat2axisangle(raw["robot0_eef_quat"]), raw["robot0_gripper_qpos"]]
    np.testing.assert_allclose(observation["state"], np.concatenate(state), rtol=1e-6)
    assert observation["state"].dtype == np.float32


def test_building_an_environment_leaves_standard_output_to_the_result(suite, capfd):
    suite.make(TASK).close()
    assert capfd.readouterr().out == ""


def test_missing_assets_and_unknown_states_are_one_sentence(libero, suite, env, monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="has 50 initial states, so there is no state 50"):
        env.reset(seed=50)
    monkeypatch.setattr(libero, "get_assets_path", lambda: tmp_path)
    with pytest.raises(OSError, match=r"LIBERO's assets are missing: download the dataset repository lerobot/lib"):
        suite.make(TASK)
